"""Several processes, one job: how they find each other, what they agree on, how they end.

JAX finds the others by itself on TPU, SLURM, Open MPI and Kubernetes; elsewhere flags say where
they are. Every process runs the same program; process 0 alone writes files and prints.
Alone, everything here costs nothing.
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
STALLED = 43  # exit code of a process that waits in vain: for itself or for another
LONG = 24 * 3600 * 1000  # ms: who waits learns by the heartbeat that another is gone
_rounds = itertools.count()
_index, _count = 0, 1


def several() -> bool:
    """Whether the processes of a job, if only one, have found each other."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def index() -> int:
    """Which process of the job this is, from 0."""
    return _index


def count() -> int:
    """Processes of the job."""
    return _count


def set_process(index: int, count: int) -> None:
    """Records which process of the job this is."""
    global _index, _count
    _index, _count = index, count


def next_key() -> str:
    """A key of the store that every process uses for the same step of the program."""
    return f"qkvjax/{next(_rounds)}"


def is_first() -> bool:
    """Whether this is process 0, which writes and prints."""
    return _index == 0


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
