"""The life of one process of a job: it finds the others, computes with them, and ends with them.

On TPU pods, in SLURM steps, under Open MPI and on Kubernetes the other processes are announced, and
JAX reads the announcement. Elsewhere flags say where they are. Every process runs the same program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qkvjax.errors import UserError
from qkvjax.parallel.distributed import STALLED, set_process, several

if TYPE_CHECKING:
    from absl import flags

NOTE_SECONDS = 3  # a process that waits this long for others prints for whom

# The flags of a command that may be one process of several: type, default, help.
FLAGS = {
    "coordinator": (str, None, "HOST:PORT of process 0, where nothing announces it"),
    "num_processes": (int, None, "number of processes in the job; 1: do not look for others"),
    "process_id": (int, None, "index of this process, from 0"),
    "init_seconds": (int, 1800, "how long the processes wait for each other at the start"),
    "heartbeat_seconds": (int, 100, "seconds of silence after which a process counts as dead"),
}


@contextlib.contextmanager
def join(values: flags.FlagValues) -> Iterator[None]:
    """Makes this process one of the job that flags or the environment announce, for a `with` block.

    Enter it before jax computes anything. Without such a job it does nothing. How the block ends:

    - normally: the process waits for the others and all end together;
    - by an error that every process raises (see `distributed.first` and `distributed.together`):
      likewise, each with the error's exit code;
    - by an error of this process alone: the process ends at once. The others notice in a collective
      that breaks off, or through the watchdog or the heartbeat, and end with STALLED and their
      stack traces.

    Raises:
      UserError: the others cannot be found, or did not come.
    """
    job = _find_job(values)
    if job is not None:
        _connect(job, values)
    if not several():
        yield
        return
    # jax ends a process by SIGABRT when the heartbeat of another is missing.
    faulthandler.enable(sys.__stderr__)
    try:
        yield
    except BaseException as error:
        if _is_of_a_lost_process(error):
            traceback.print_exception(error)
            reason = _first_line(error)
            _exit_now(
                UserError(
                    f"another process of the job is gone ({reason}): run the same command again",
                    STALLED,
                )
            )
        if not getattr(error, "agreed", False):
            _exit_now(error)
        _shut_down()
        raise
    _shut_down()


# ---- finding the others -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Job:
    """Where a job meets, and which part of it this process is.

    Attributes:
      address: HOST:PORT of process 0.
      count: processes of the job.
      index: this process, from 0.
      local_devices: which devices of this machine are this process's; None means all.
    """

    address: str
    count: int
    index: int
    local_devices: object = None


def _find_job(values: flags.FlagValues) -> _Job | None:
    """Returns the job that flags, environment variables or a cluster announce; None for none.

    Raises:
      UserError: what is announced is incomplete or contradictory.
    """
    # JAX has no public name for what jax.distributed.initialize() itself calls.
    from jax._src import clusters

    # With a --coordinator a single process uses the collectives of several, and so adds up numbers
    # in the same order as several processes would.
    without_coordinator = values.coordinator is None
    if without_coordinator and values.num_processes == 1:
        return None
    if several():
        return None
    given = {
        "coordinator": values.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": values.num_processes,
        "process_id": values.process_id,
    }
    *detected, local_devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        *given.values(), None, None, values.init_seconds
    )[:4]
    announced = dict(zip(given, detected, strict=True))
    missing = [name for name, value in announced.items() if value is None]
    has_flags = any(values[name].value is not None for name in given)

    if without_coordinator and announced["num_processes"] == 1:
        return None
    if len(missing) == len(announced):
        return None
    if missing and not has_flags:
        return None
    if missing:
        raise UserError(
            f"{' and '.join('--' + name for name in missing)} missing: nothing here announces the"
            " other processes (no TPU pod, SLURM step, Open MPI or Kubernetes job): give"
            " --coordinator=HOST:PORT, --num_processes=N and --process_id=K"
        )
    job = _Job(*announced.values(), local_devices)
    _check(job)
    return job


def _check(job: _Job) -> None:
    """Raises UserError where a job's numbers, its address or its certificates cannot work."""
    import jax

    if not 0 <= job.index < job.count:
        raise UserError(
            f"--process_id={job.index} must be from 0 to {job.count - 1}: the job has"
            f" {job.count} processes"
        )
    if not job.address.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={job.address!r} has no port: write HOST:PORT")
    if os.environ.get("JAX_MTLS_CERT_FILE") and not hasattr(jax.config, "jax_mtls_cert_file"):
        raise UserError(
            f"JAX_MTLS_CERT_FILE is set, but jax {jax.__version__} does not support mutual TLS: use"
            " jax 0.12 or newer, or unset it"
        )


# ---- meeting them -----------------------------------------------------------------------------


def _connect(job: _Job, values: flags.FlagValues) -> None:
    """Meets the other processes of a job.

    Raises:
      UserError: process 0 cannot listen at its address, or jax refuses the job.
    """
    import jax

    from qkvjax.parallel.mesh import find_devices

    set_process(job.index, job.count)
    # SIGTERM belongs to `training.signals`: jax's own handler would keep the signal from it.
    jax.config.update("jax_enable_preemption_service", False)
    too_late = UserError(
        f"process {job.index} of {job.count} did not meet the others at {job.address} within"
        f" {values.init_seconds} s: start all of them, and check that they can reach this address"
        " and that its port is free (JAX_COORDINATOR_BIND_ADDRESS is where process 0 listens, if it"
        " differs)"
    )
    # jax ends a process that waited too long by a signal and a page of C++ stack.
    give_up = _start_timer(values.init_seconds, _exit_now, too_late)
    note = _start_timer(NOTE_SECONDS, _print_who_is_missing, job)
    # By default jax listens on every address of the machine, for anybody.
    listen = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", job.address)
    try:
        if job.index == 0:
            _check_can_listen(listen)
        jax.distributed.initialize(
            job.address,
            job.count,
            job.index,
            job.local_devices,
            initialization_timeout=values.init_seconds + 60,  # after `give_up`
            heartbeat_timeout_seconds=values.heartbeat_seconds,
            coordinator_bind_address=listen,
        )
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise UserError(f"{_first_line(error)}; {too_late}") from None
    finally:
        note.cancel()
        give_up.cancel()
    # In this call each process tells the others which devices it has, so all must make it together.
    find_devices()


def _start_timer(seconds: float, call, *arguments) -> threading.Timer:
    """Starts a timer that does not keep the process alive."""
    timer = threading.Timer(seconds, call, arguments)
    timer.daemon = True
    timer.start()
    return timer


def _check_can_listen(address: str) -> None:
    """Raises OSError where nothing can listen at HOST:PORT; jax would end by a segmentation
    fault."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(socket.gaierror):  # it may be a name that has IPv6 addresses alone
        socket.create_server((host.strip("[]"), int(port)), family=family).close()


def _print_who_is_missing(job: _Job) -> None:
    """Prints for whom this process waits.

    An interactive shell of SLURM has the variables of a step with several tasks, although only one
    process runs there. The message names SLURM then.
    """
    if job.index > 0:
        waits = f"process {job.index} of {job.count} waits for process 0 at {job.address}"
    else:
        others = [str(i) for i in range(1, job.count)]
        listed = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
        plural = "es" if len(others) > 1 else ""
        waits = f"process 0 of {job.count} waits at {job.address} for process{plural} {listed}"
    slurm_job = os.environ.get("SLURM_JOB_ID")
    reason = f"; the variables of SLURM job {slurm_job} say {job.count} tasks" if slurm_job else ""
    print(
        f"{waits}{reason}. Start the others, by srun or by hand, or give --num_processes=1 if this"
        " process is the only one",
        file=sys.stderr,
        flush=True,
    )


# ---- ending -----------------------------------------------------------------------------------


def _is_of_a_lost_process(error: BaseException) -> bool:
    """Returns whether an error says that a collective broke off."""
    import jax

    words = ("gloo", "nccl", "connection", "heartbeat", "unavailable", "deadline", "coordination")
    text = str(error).lower()
    return isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in words)


def _first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, at most 200 characters of it."""
    return str(error).strip().splitlines()[0][:200]


def _exit_now(error: BaseException) -> None:
    """Ends this process without waiting for the others, which may be waiting for it."""
    if isinstance(error, UserError):
        print(f"{error.label}: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "code", 1)
    # Not sys.exit: it runs exit handlers, which may wait for the others, and from the thread of a
    # timer it would not end the process.
    os._exit(code if isinstance(code, int) else 1)


def _shut_down() -> None:
    """Leaves the job once all processes are ready to."""
    import jax

    sys.stdout.flush()
    jax.distributed.shutdown()
