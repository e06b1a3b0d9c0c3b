"""The host process: its memory allocator, its compilation cache, facts about the machine."""

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

# Dense bfloat16 peak in FLOP/s by jax's device kind. For a kind that is not listed no MFU is
# reported.
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
    """Makes glibc keep freed blocks, in huge pages, instead of returning them to the kernel.

    XLA's CPU client allocates the temporary memory of a program anew at each call. Above 32 MiB
    glibc maps fresh pages each time, and faulting them in cost a third of the step of a small
    model (LOG.md has the figures).

    Does nothing without glibc, nor where an accelerator computes: the host's memory then holds data
    and saves alone.
    """
    if not sys.platform.startswith("linux") or xla_flags.accelerator() is not None:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # Parameters of mallopt, from malloc.h.
        m_trim_threshold = -1
        m_top_pad = -2
        m_mmap_max = -4
        m_arena_max = -8
        # One arena for all threads: the heaps of further arenas have 64 MiB at most and go back to
        # the kernel when they are empty.
        libc.mallopt(m_arena_max, 1)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 2**26)
        _ask_for_huge_pages(libc)


def keep_programs() -> None:
    """Lets jax keep compiled programs for the next run, in ~/.cache/qkvjax/programs.

    Call it before jax is imported. $JAX_COMPILATION_CACHE_DIR names another folder; set but empty,
    it turns the cache off. Compiled programs are code, so the folder is made for the user alone,
    and a folder that others can write to is not used.
    """
    try:
        folder = Path("~/.cache/qkvjax/programs").expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):
        # Without a home folder that can be written, programs are compiled again in each run.
        return
    if status.st_uid == os.getuid() and not status.st_mode & 0o022:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Grows the heap, without touching it, and asks the kernel to back it by huge pages.

    Most kernels grant this: it saves 2 to 4 % of the step of a small model on two cores.
    """
    madv_hugepage = 14  # from sys/mman.h
    page = 2**12
    size = 2**30  # below m_trim_threshold, so that the freed block stays in the heap
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block:  # None where the process may not have so much address space
        start = -(-block // page) * page
        # The result is not checked: where the kernel refuses, nothing changes.
        libc.madvise(start, (block + size - start) // page * page, madv_hugepage)
        libc.free(block)


def environment() -> dict[str, object]:
    """Returns versions, devices and the code's revision, for `run.json` and reports. No secrets."""
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
    """Returns the versions of the packages that decide what is computed."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def now() -> str:
    """Returns the time as records write it: ISO 8601, to the second, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def version() -> str:
    """Returns the version of qkvjax; "source" for a checkout that is not installed."""
    try:
        return importlib.metadata.version("qkvjax")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def revision() -> str | None:
    """Returns the git commit of this code, with "+" where files differ from it; None outside a
    checkout."""
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
    """Returns the device's name for people: the GPU's or TPU's kind, or the processor's name."""
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
    """Returns the free bytes of a Linux host whose memory holds the arrays; None elsewhere.

    Linux promises more memory than it has and kills a process that uses it, so callers check first.
    """
    import jax

    meminfo = Path("/proc/meminfo")
    if jax.default_backend() != "cpu" or not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])  # the file counts in KiB


def free_device_memory() -> int | None:
    """Returns the free bytes of this process's fullest device; None where devices do not report
    them."""
    import jax

    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        free = free_memory()  # which all virtual devices share
        return None if free is None else free // len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in each for each in stats):
        return None
    return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)


def peak_flops(num_devices: int = 1) -> float | None:
    """Returns the dense bfloat16 peak of so many devices in FLOP/s; None for an unlisted kind."""
    import jax

    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return peak * num_devices if peak else None
