"""Which processes of a job share a folder, and in which order they fill it."""

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
    """Calls `call(sign)` on every process: first on one of those that share a folder, then on the
    others.

    So one process prepares what the folder lacks and the others use it, without locks, which many
    network file systems do not have. Folders that are not shared are filled at the same time.

    Args:
      folder: what processes may share; None only where there is one process.
      call: gets `sign`, a function to call at each sign of progress.
      alive: called at each sign of progress, here and in every process that waits for this one.

    Returns:
      The result of this process's call.

    Raises:
      UserError: on every process, where any call raises one.
    """
    if not distributed.several():
        return call(alive)
    leader = _leader(folder)
    board = _Board(distributed.next_key(), alive)
    result = refusal = error = None
    # The others wait here for their leader. Where it failed they need not try.
    if leader == distributed.index() or board.wait_for_outcome(leader) is None:
        result, refusal, error = distributed.call_outcome(lambda: call(board.sign))
    board.end(refusal)
    refusals = [board.wait_for_outcome(process) for process in range(distributed.count())]
    verdict = distributed.first_refusal(refusals)
    return distributed.result_or_raise(result, verdict, error if refusal == verdict else None)


def _leader(folder: Path) -> int:
    """Returns the first of the processes that see the same folder as this one.

    Each process leaves a marker file in its folder; who sees another's marker shares its folder.
    """
    job = distributed.first(lambda: uuid.uuid4().hex)
    me = distributed.index()
    markers = [folder / f".job-{job}-{i}" for i in range(distributed.count())]
    # Where the folder cannot be written this process leads itself, and `call` reports the error.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        markers[me].touch()
    distributed.together(lambda: None)  # all markers are written
    visible = [i for i, marker in enumerate(markers) if marker.exists()]
    distributed.together(lambda: None)  # all have looked
    if me not in visible:
        return me
    markers[me].unlink()
    return min(visible)


class _Board:
    """A notice board of the job: signs of progress, and how each process's call ended.

    It is in the key-value store, under KEY/PROCESS/sign and KEY/PROCESS/end.
    """

    POLL = 0.5  # seconds between two reads
    SIGN = 5.0  # seconds between two signs that are written

    def __init__(self, key: str, alive: Callable[[], None]):
        self._key = key
        self._alive = alive
        self._last_sign = time.monotonic()
        self._signs = 0
        self._entries: dict[str, str] = {}

    def sign(self) -> None:
        """Writes that this process makes progress, at most every SIGN seconds."""
        self._alive()
        now = time.monotonic()
        if now - self._last_sign >= self.SIGN:
            self._last_sign = now
            self._signs += 1
            self._write("sign", self._signs)

    def end(self, refusal: list | None) -> None:
        """Writes how the call of this process ended; see `distributed.call_outcome`."""
        self._write("end", refusal)

    def wait_for_outcome(self, process: int) -> list | None:
        """Returns the refusal with which the call of a process ended, None for success.

        While it waits, a change on the board counts as progress of this process too.
        """
        name = f"{self._key}/{process}/end"
        while name not in self._entries:
            entries = dict(distributed.client().key_value_dir_get(self._key))
            if entries != self._entries:
                self._alive()
                self._entries = entries
            else:
                time.sleep(self.POLL)
        return json.loads(self._entries[name])

    def _write(self, name, value):
        key = f"{self._key}/{distributed.index()}/{name}"
        distributed.client().key_value_set(key, json.dumps(value), allow_overwrite=True)
