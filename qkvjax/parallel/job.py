"""The life of one process of a job: it finds the others, runs, and ends with them."""

from __future__ import annotations

import contextlib
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

NOTE_SECONDS = 3  # a process that waits for others so long says for whom

# The flags of a door that may be one process of several.
FLAGS = {
    "coordinator": (str, None, "HOST:PORT of process 0, where nothing announces it"),
    "num_processes": (int, None, "processes of the job; 1 looks for no others"),
    "process_id": (int, None, "which of them this is, from 0"),
    "init_seconds": (int, 1800, "how long the processes wait for each other"),
    "heartbeat_seconds": (int, 100, "after so long without a sign a process counts as dead"),
}


@contextlib.contextmanager
def join(values: flags.FlagValues) -> Iterator[None]:
    """One process of the job that the flags or the surroundings tell of; call it before jax
    computes anything.

    An error that every process raises ends all of them in order, each with the error's code. One
    that hits this process alone ends it at once, and the others by what they miss: with STALLED,
    and stack traces, as soon as a collective tells them, else by the watchdog or the heartbeat.

    Raises:
      UserError: the others cannot be found, or did not come.
    """
    _start(values)
    if not several():
        yield
        return
    # jax ends a process by SIGABRT when the heartbeat of another is missing.
    faulthandler.enable(sys.__stderr__)
    try:
        yield
    except BaseException as error:
        if _of_another(error):
            traceback.print_exception(error)
            lost = str(error).strip().splitlines()[0][:200]
            told = f"another process of the job is gone ({lost}): the same command goes on"
            _leave(UserError(told, STALLED))
        if not getattr(error, "agreed", False):
            _leave(error)
        _end()
        raise
    _end()


def _of_another(error: BaseException) -> bool:
    """Whether an error says that a collective broke off."""
    import jax

    signs = ("gloo", "nccl", "connection", "heartbeat", "unavailable", "deadline", "coordination")
    text = str(error).lower()
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in text for sign in signs)


def _start(values: flags.FlagValues) -> None:
    import jax
    from jax._src import clusters  # what jax.distributed.initialize() itself asks

    from qkvjax.parallel.mesh import find_devices

    # One process that has a --coordinator talks by way of it, and so sums in the order of several.
    alone = values.coordinator is None
    if alone and values.num_processes == 1 or several():
        return
    given = {
        "coordinator": values.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": values.num_processes,
        "process_id": values.process_id,
    }
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        *given.values(), None, None, values.init_seconds
    )
    found, local_devices = dict(zip(given, found[:3], strict=True)), found[3]
    missing = [name for name, value in found.items() if value is None]
    asked = any(values[name].value is not None for name in given)
    if alone and found["num_processes"] == 1 or len(missing) == 3 or missing and not asked:
        return
    if missing:
        raise UserError(
            f"{' and '.join('--' + name for name in missing)} missing: nothing here announces the"
            " other processes (no TPU pod, SLURM step, Open MPI or Kubernetes job), so give"
            " --coordinator=HOST:PORT, --num_processes=N and --process_id=K"
        )
    address, count, index = found.values()
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} is none of the {count} processes 0 to {count - 1}")
    if not address.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={address!r} has no port: write HOST:PORT")
    if os.environ.get("JAX_MTLS_CERT_FILE") and not hasattr(jax.config, "jax_mtls_cert_file"):
        raise UserError(
            f"JAX_MTLS_CERT_FILE is set, and jax {jax.__version__} knows no mutual TLS: use jax"
            " 0.12 or newer, or unset it"
        )
    set_process(index, count)
    # SIGTERM is ours: jax's own handler would keep it from `training.signals`.
    jax.config.update("jax_enable_preemption_service", False)
    late = UserError(
        f"process {index} of {count} did not meet the others at {address} within"
        f" {values.init_seconds} s: start all of them, and see that they reach that address and"
        " that its port is free (JAX_COORDINATOR_BIND_ADDRESS says where process 0 listens, if"
        " elsewhere)"
    )
    # jax ends a process that waited too long by a signal and a page of C++.
    patience = threading.Timer(values.init_seconds, _leave, [late])
    patience.daemon = True
    patience.start()
    note = threading.Timer(NOTE_SECONDS, _say_who_is_missing, [address, count, index])
    note.daemon = True
    note.start()
    # By default jax listens on every address of the machine, to anybody.
    listen = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", address)
    host, _, port = listen.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if index == 0:  # where it cannot listen, jax ends by a segmentation fault
            with contextlib.suppress(socket.gaierror):  # a name of IPv6, perhaps
                socket.create_server((host.strip("[]"), int(port)), family=family).close()
        jax.distributed.initialize(
            address,
            count,
            index,
            local_devices,
            initialization_timeout=values.init_seconds + 60,
            heartbeat_timeout_seconds=values.heartbeat_seconds,
            coordinator_bind_address=listen,
        )
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise UserError(f"{str(error).strip().splitlines()[0][:200]}; {late}") from None
    finally:
        note.cancel()
        patience.cancel()
    find_devices()  # all together: each tells the others what it has


def _say_who_is_missing(address: str, count: int, index: int) -> None:
    """Prints for whom this process waits. An interactive shell of SLURM has the variables of a
    step of several tasks, of which it is the only one that runs anything."""
    others = [str(i) for i in range(count) if i != index]
    listed = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
    if index:
        waits = f"process {index} of {count} waits for process 0 at {address}"
    else:
        plural = "es" if len(others) > 1 else ""
        waits = f"process 0 of {count} waits at {address} for process{plural} {listed}"
    step = os.environ.get("SLURM_JOB_ID")
    reason = f"; the variables of SLURM job {step} say {count} tasks" if step else ""
    print(
        f"{waits}{reason}. Start the others, by srun or by hand, or give --num_processes=1 if this"
        " process is the only one",
        file=sys.stderr,
        flush=True,
    )


def _leave(error: BaseException) -> None:
    """Ends this process without waiting for others, who may be waiting for it."""
    if isinstance(error, UserError):
        print(f"{error.label}: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "code", 1)
    os._exit(code if isinstance(code, int) else 1)


def _end() -> None:
    import jax

    sys.stdout.flush()
    jax.distributed.shutdown()  # waits for the others
