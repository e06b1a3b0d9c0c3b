"""What the processes of a job agree on, and how they tell each other.

Every process runs the same program; process 0 alone writes files and prints. `parallel.job` starts
and ends a process. Where there is only one process, every function here costs nothing.

Small values travel as JSON through the key-value store of jax's coordinator, arrays through
collectives.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qkvjax.errors import UserError
from qkvjax.parallel.host import versions

if TYPE_CHECKING:
    from jax.sharding import Mesh

T = TypeVar("T")
STALLED = 43  # exit code of a process that waits in vain: for its own work or for another process
# Milliseconds of waiting for a value, a day. Nobody waits so long: that another process is gone is
# noticed by the heartbeat.
WAIT_MS = 24 * 3600 * 1000
_rounds = itertools.count()
_index = 0
_count = 1


# ---- this process -----------------------------------------------------------------------------


def several() -> bool:
    """Returns whether this process has joined a job, which may have one process only."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def index() -> int:
    """Returns which process of the job this is, from 0."""
    return _index


def count() -> int:
    """Returns the number of processes of the job."""
    return _count


def is_first() -> bool:
    """Returns whether this is process 0, which writes and prints."""
    return _index == 0


def set_process(index: int, count: int) -> None:
    """Records which process of the job this is, and of how many."""
    global _index, _count
    _index = index
    _count = count


# ---- the key-value store ----------------------------------------------------------------------


def client():
    """Returns the client of the job's key-value store, for which jax has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


def next_key() -> str:
    """Returns a new key of the store, the same on every process.

    It counts calls: every process must call it at the same points of the program.
    """
    return f"qkvjax/{next(_rounds)}"


def _wait_for(key: str):
    """Returns the value under a key, as soon as a process has set it."""
    return json.loads(client().blocking_key_value_get(key, WAIT_MS))


# ---- one result or one error for all ----------------------------------------------------------


def first(call: Callable[[], T]) -> T:
    """Calls `call()` on process 0 alone and returns its result on every process.

    The result must consist of JSON's types. A UserError that it raises is raised on every process.
    """
    if not several():
        return call()
    key = next_key()
    if is_first():
        result, refusal, error = call_outcome(call)
        client().key_value_set(key, json.dumps([result, refusal]))
        return result_or_raise(result, refusal, error)
    result, refusal = _wait_for(key)
    return result_or_raise(result, refusal)


def together(call: Callable[[], T]) -> T:
    """Calls `call()` on every process and returns each process its result, once all have one.

    A UserError that any process raises is raised on every process. Process 0 collects how the calls
    ended and publishes the verdict.
    """
    if not several():
        return call()
    key = next_key()
    result, refusal, error = call_outcome(call)
    client().key_value_set(f"{key}/{_index}", json.dumps(refusal))
    if is_first():
        refusals = [_wait_for(f"{key}/{i}") for i in range(_count)]
        verdict = first_refusal(refusals)
        client().key_value_set(f"{key}/verdict", json.dumps(verdict))
    else:
        verdict = _wait_for(f"{key}/verdict")
    return result_or_raise(result, verdict, error if refusal == verdict else None)


def call_outcome(call: Callable[[], T]) -> tuple[T | None, list | None, UserError | None]:
    """Returns (result, None, None) of a call, or (None, refusal, error) where it raises UserError.

    A refusal is [message, exit code]: what other processes need to raise the error as well.
    """
    try:
        return call(), None, None
    except UserError as error:
        return None, [str(error), error.code], error


def first_refusal(refusals: list[list | None]) -> list | None:
    """Returns the refusal of the first process that has one; its message names the process, unless
    it is process 0."""
    for process, refusal in enumerate(refusals):
        if refusal is not None:
            message, code = refusal
            return [f"process {process}: {message}" if process else message, code]
    return None


def result_or_raise(result: T, refusal: list | None, error: UserError | None = None) -> T:
    """Returns the result, or raises the error of a refusal.

    The error is marked as `agreed`: every process raises it, so that all can end in order.
    """
    if refusal is None:
        return result
    error = error or UserError(*refusal)
    error.agreed = True
    raise error


# ---- one program ------------------------------------------------------------------------------


def check_alike(facts: Callable[[], Mapping[str, object]]) -> None:
    """Raises UserError on every process where one has other facts than process 0, and names them.

    Args:
      facts: returns this process's facts, such as `program()` and the fields of its configuration.
    """
    if not several():
        return
    mine = json.loads(json.dumps(facts(), default=str))
    expected = first(lambda: mine)

    def compare():
        names = [name for name in mine | expected if mine.get(name) != expected.get(name)]
        if not names:
            return
        lines = [
            f"{name}: {mine.get(name)!r}, process 0 has {expected.get(name)!r}"
            for name in names[:5]
        ]
        if len(names) > 5:
            lines.append(f"and {len(names) - 5} more")
        raise UserError(
            "the processes of a job run one program with one configuration, and this one"
            " differs:\n  " + "\n  ".join(lines)
        )

    together(compare)


def program() -> dict[str, str]:
    """Returns the versions and a hash of the code that this process runs."""
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


# ---- arrays -----------------------------------------------------------------------------------


def fetch(tree: T) -> T:
    """Returns arrays whole in the memory of this host, also where no process has all of them."""
    import jax
    from jax.experimental import multihost_utils

    if not several():
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


class MaxOverProcesses:
    """The largest number that any process gives after a step, known to all after the same step.

    For requests to save or to stop, which reach one process and concern all. The devices compute
    the maximum, and it is read LAG steps later, so that no process waits for a device. Where there
    is one process, it is known at once.
    """

    LAG = 2

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._waiting: collections.deque = collections.deque()

    def __call__(self, number: int) -> int:
        """Takes this process's number; returns the largest of LAG steps ago, 0 before that."""
        if not several():
            return number
        self._waiting.append(_max_program(self._mesh)(number))
        return int(self._waiting.popleft()) if len(self._waiting) > self.LAG else 0


@functools.cache
def _max_program(mesh: Mesh):
    """Returns a function: this process's int -> the largest of all processes', an array."""
    import jax
    import numpy as np

    one_a_device = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    largest = jax.jit(jax.numpy.max)

    def call(number: int):
        local = np.full(1, number, np.int32)
        return largest(
            jax.make_array_from_callback((mesh.size,), one_a_device, lambda index: local)
        )

    return call
