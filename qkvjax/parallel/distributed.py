"""Several processes, one job: how they find each other, what they agree on, how they end.

JAX finds the others by itself on TPU, SLURM, Open MPI and Kubernetes; elsewhere flags say where
they are. Every process runs the same program; process 0 alone writes files and prints.
Alone, everything here costs nothing.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import functools
import hashlib
import itertools
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qkvjax.errors import UserError
from qkvjax.parallel.host import versions

if TYPE_CHECKING:
    from absl import flags
    from jax.sharding import Mesh

T = TypeVar("T")
STALLED = 43  # exit code of a process that waits in vain: for itself or for another
NOTE_SECONDS = 3  # a process that waits for others so long says for whom
LONG = 24 * 3600 * 1000  # ms: who waits learns by the heartbeat that another is gone
_rounds = itertools.count()
_index, _count = 0, 1


# The flags of a door that may be one process of several.
FLAGS = {
    "coordinator": (str, None, "HOST:PORT of process 0, where nothing announces it"),
    "num_processes": (int, None, "processes of the job; 1 looks for no others"),
    "process_id": (int, None, "which of them this is, from 0"),
    "init_seconds": (int, 1800, "how long the processes wait for each other"),
    "heartbeat_seconds": (int, 100, "after so long without a sign a process counts as dead"),
}


def several() -> bool:
    """Whether the processes of a job, if only one, have found each other."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def index() -> int:
    """Which process of the job this is, from 0."""
    return _index


def count() -> int:
    """Processes of the job."""
    return _count


def next_key() -> str:
    """A key of the store that every process uses for the same step of the program."""
    return f"qkvjax/{next(_rounds)}"


def is_first() -> bool:
    """Whether this is process 0, which writes and prints."""
    return _index == 0


@contextlib.contextmanager
def job(values: flags.FlagValues) -> Iterator[None]:
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
    global _index, _count
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
    _index, _count = index, count
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


def client():
    """The client of the job's key-value store."""
    from jax._src import distributed  # jax shows its key-value store to nobody else

    return distributed.global_state.client


def _heard(key: str):
    """What some process says under this key, as soon as it does."""
    return json.loads(client().blocking_key_value_get(key, LONG))


def first(call: Callable[[], T]) -> T:
    """What `call()` returns on process 0, for all; the others do not call it.

    Its result is of JSON's types. A UserError that it raises is raised by all.
    """
    if not several():
        return call()
    key = next_key()
    if is_first():
        answer = outcome(call)
        client().key_value_set(key, json.dumps(answer[:2]))
        return opened(*answer)
    return opened(*_heard(key))


def together(call: Callable[[], T]) -> T:
    """`call()` on every process; its own result for each, once all have one.

    A UserError that any of them raises is raised by all.
    """
    if not several():
        return call()
    key = next_key()
    value, refusal, error = outcome(call)
    client().key_value_set(f"{key}/{_index}", json.dumps(refusal))
    if is_first():
        told = [(i, _heard(f"{key}/{i}")) for i in range(_count)]
        verdict = next(([f"process {i}: {r[0]}" if i else r[0], r[1]] for i, r in told if r), None)
        client().key_value_set(f"{key}/verdict", json.dumps(verdict))
    else:
        verdict = _heard(f"{key}/verdict")
    return opened(value, verdict, error if refusal == verdict else None)


def outcome(call: Callable[[], T]) -> tuple[T | None, list | None, UserError | None]:
    """(result, None, None) of a call, or (None, [message, code], error)."""
    try:
        return call(), None, None
    except UserError as error:
        return None, [str(error), error.code], error


def opened(value, refusal: list | None, error: UserError | None = None):
    if refusal is None:
        return value
    error = error or UserError(*refusal)
    error.agreed = True
    raise error


def check_alike(facts: Callable[[], Mapping[str, object]]) -> None:
    """Raises UserError on every process when one has other facts than process 0, naming them.

    Args:
      facts: gives this process's; `program()` and the fields of its configuration, say.
    """
    if not several():
        return
    mine = json.loads(json.dumps(facts(), default=str))
    theirs = first(lambda: mine)

    def compare():
        names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
        if names:
            lines = (f"{n}: {mine.get(n)!r}, process 0 has {theirs.get(n)!r}" for n in names[:5])
            more = f"\n  and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(
                "the processes of a job run one program with one configuration, and this one"
                " differs:\n  " + "\n  ".join(lines) + more
            )

    together(compare)


def program() -> dict[str, str]:
    """The versions and the code that this process runs."""
    code = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for file in sorted(folder.rglob("*.py")):
        code.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return {
        "python": ".".join(map(str, sys.version_info[:2])),
        **versions(),
        "qkvjax's code": code.hexdigest()[:12],
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def fetch(tree: T) -> T:
    """`jax.device_get` of arrays that no process may have all of."""
    import jax
    from jax.experimental import multihost_utils

    if not several():
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


class Loudest:
    """The largest number that any process says after a step, heard by all after the same one.

    It takes two steps to be heard, so that no process waits for a device; alone it is heard at
    once. For requests to save or to stop, which reach one process and concern all.
    """

    LAG = 2

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._waiting: collections.deque = collections.deque()

    def __call__(self, mine: int) -> int:
        if not several():
            return mine
        self._waiting.append(_largest(self._mesh)(mine))
        return int(self._waiting.popleft()) if len(self._waiting) > self.LAG else 0


@functools.cache
def _largest(mesh: Mesh):
    """A function of this process's int: the largest of all processes', an array."""
    import jax
    import numpy as np

    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    largest = jax.jit(jax.numpy.max)

    def call(mine: int):
        local = np.full(1, mine, np.int32)
        return largest(jax.make_array_from_callback((mesh.size,), place, lambda index: local))

    return call
