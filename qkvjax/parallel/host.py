"""The host process: its memory allocator and what there is to know about the machine."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from qkvjax.parallel import xla_flags

# Dense bfloat16 peak in FLOP/s by jax's device kind; a device that is not here has no MFU.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def keep_freed_memory() -> None:
    """Makes glibc keep freed blocks instead of returning them to the kernel, in huge pages.

    XLA's CPU client allocates a program's temporary memory anew at each call. Above 32 MiB
    glibc maps fresh pages each time, and faulting them in cost a third of the step of a small
    model (LOG.md has the figures). One arena for all threads, since the others' heaps hold 64 MiB
    at most and go back to the kernel when they are empty. Without glibc this does nothing, and
    where an accelerator computes it is left out: there the host's memory holds data and saves.
    """
    if not sys.platform.startswith("linux") or xla_flags.accelerator() is not None:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8
        libc.mallopt(m_arena_max, 1)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 2**26)
        _ask_for_huge_pages(libc)


def keep_programs() -> None:
    """Lets jax keep compiled programs for the next run, in ~/.cache/qkvjax/programs.

    $JAX_COMPILATION_CACHE_DIR names another folder, or none when it is empty. Programs are code:
    the folder is the user's alone, and one that others can write to is left alone. Call it before
    jax is imported.
    """
    try:
        folder = Path("~/.cache/qkvjax/programs").expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):
        return  # no home, or one that cannot be written, costs a minute of compiling, not the run
    if status.st_uid == os.getuid() and not status.st_mode & 0o022:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Grows the heap, untouched, and tells the kernel to back it by huge pages.

    Most kernels give them to who asks: 2 to 4 % of the step of a small model on two cores.
    """
    madv_hugepage, page, size = 14, 2**12, 2**30  # below the threshold of trimming
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block:  # None where so much address space may not be had; a refused wish changes nothing
        start = -(-block // page) * page
        libc.madvise(start, (block + size - start) // page * page, madv_hugepage)
        libc.free(block)


def environment() -> dict[str, object]:
    """Versions, devices and the code's revision, for `run.json` and reports. No secrets."""
    import jax

    device = jax.devices()[0]
    return {
        "date": now(),
        "python": platform.python_version(),
        **versions(),
        "qkvjax": version(),
        "git": revision(),
        "platform": device.platform,
        "device": device_name(),
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def versions() -> dict[str, str]:
    """Of the packages that decide what is computed."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def now() -> str:
    """The time as records write it: to the second, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def version() -> str:
    """The installed version, or "source" when run from a checkout that is not installed."""
    try:
        return importlib.metadata.version("qkvjax")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def revision() -> str | None:
    """The git commit of this code, with "+" when files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments):
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", ".").stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if changed else "")


def device_name() -> str:
    """What people call the device: the GPU's or TPU's kind, or the processor's name."""
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU, {line.partition(':')[2].strip()}"
    except OSError:
        pass  # no /proc: a Mac, say
    return f"CPU, {platform.processor() or platform.machine()}"


def free_memory() -> int | None:
    """Bytes that arrays may take now, where they lie in the memory of a Linux host; else None.

    Linux promises more memory than there is and kills who uses it.
    """
    import jax

    told = Path("/proc/meminfo")
    if jax.default_backend() != "cpu" or not told.exists():
        return None
    lines = dict(line.split(":") for line in told.read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


def free_device_memory() -> int | None:
    """Bytes that arrays may still take on the fullest device of this process; None where the
    devices do not say."""
    import jax

    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        free = free_memory()  # all of them share the host's
        return None if free is None else free // len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in each for each in stats):
        return None
    return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)


def peak_flops(num_devices: int = 1) -> float | None:
    """Dense bfloat16 FLOP/s of so many devices, or None where the kind is not in the table."""
    import jax

    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return peak * num_devices if peak else None
