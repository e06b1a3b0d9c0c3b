"""Which processes of a job share a folder, and the order in which they fill it."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qkvjax.parallel import distributed

T = TypeVar("T")


def by_folder(
    folder: Path | None, call: Callable[[Callable[[], None]], T], alive: Callable[[], None]
) -> T:
    """`call(sign)` on every process: first on one of those that share a folder, then on the others.

    So one process prepares what the folder lacks and the others find it, without locks, which many
    network file systems do not have. Folders that are not shared are filled at the same time.

    Args:
      folder: what the processes may share; a process that is alone needs none.
      call: calls `sign` at each sign of progress.
      alive: is called at these, here and in each process that waits for this one.

    Raises:
      UserError: on every process, where any `call` does.
    """
    if not distributed.several():
        return call(alive)
    leader = _leader(folder)
    board = _Board(distributed.next_key(), alive)
    value = refusal = error = None
    if leader == distributed.index() or board.outcome(leader) is None:
        value, refusal, error = distributed.outcome(lambda: call(board.sign))
    board.end(refusal)
    verdict = None
    for process in reversed(range(distributed.count())):
        if outcome := board.outcome(process):
            message, code = outcome
            verdict = [f"process {process}: {message}" if process else message, code]
    return distributed.opened(value, verdict, error if refusal == verdict else None)


def _leader(folder: Path) -> int:
    """The first of the processes that see the same folder as this one."""
    job = distributed.first(lambda: uuid.uuid4().hex)
    me = distributed.index()
    marks = [folder / f".job-{job}-{i}" for i in range(distributed.count())]
    with contextlib.suppress(OSError):  # without a mark it leads itself, and `call` says why
        folder.mkdir(parents=True, exist_ok=True)
        marks[me].touch()
    distributed.together(lambda: None)
    seen = [i for i, mark in enumerate(marks) if mark.exists()]
    distributed.together(lambda: None)
    if me not in seen:
        return me
    marks[me].unlink()
    return min(seen)


class _Board:
    """Where the processes of a job write signs of progress, and how their calls ended."""

    POLL = 0.5  # seconds between two looks
    SIGN = 5.0  # and between two signs

    def __init__(self, key: str, alive: Callable[[], None]):
        self._key = key
        self._alive = alive
        self._signed = time.monotonic()
        self._signs = 0
        self._seen: dict[str, str] = {}

    def sign(self) -> None:
        """Says that this process goes on."""
        self._alive()
        now = time.monotonic()
        if now - self._signed >= self.SIGN:
            self._signed = now
            self._signs += 1
            self._write("sign", self._signs)

    def end(self, refusal: list | None) -> None:
        """Says how the call of this process ended."""
        self._write("end", refusal)

    def outcome(self, process: int) -> list | None:
        """How the call of a process ended, as soon as it does: None, or a refusal."""
        name = f"{self._key}/{process}/end"
        while name not in self._seen:
            seen = dict(distributed.client().key_value_dir_get(self._key))
            if seen != self._seen:
                self._alive()
                self._seen = seen
            else:
                time.sleep(self.POLL)
        return json.loads(self._seen[name])

    def _write(self, name, value):
        key = f"{self._key}/{distributed.index()}/{name}"
        distributed.client().key_value_set(key, json.dumps(value), allow_overwrite=True)
