"""How far a long preparation is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

SECONDS = 30.0  # between two lines of the log


class Progress:
    """Counts units of work and reports them; use it in a `with` statement.

    Args:
      what: of a line, as in "data: WHAT 12 of 50 MB".
      total: units in all, None when unknown.
      log: gets a line every SECONDS where stderr is not a terminal.
      alive: called at each `add`, so that a watchdog sees that the work goes on.
      at_most: the total is an upper limit.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        log: Callable[[str], None],
        alive: Callable[[], None],
        at_most: bool = False,
    ):
        self._what = what
        self._total = total
        self._log = log
        self._alive = alive
        self._at_most = "at most " if at_most else ""
        self._done = 0
        self._skipped = 0
        self._began = self._reported = time.monotonic()
        self._bar = None

    def __enter__(self) -> Progress:
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=f"data: {self._what}",
                total=self._total,
                unit="B",
                unit_scale=True,
                leave=False,
                delay=2,
            )
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, num_bytes: int, skipped: bool = False) -> None:
        """Counts bytes that are done; `skipped` ones were done by an earlier start."""
        self._alive()
        self._done += num_bytes
        if skipped:
            self._skipped += num_bytes
        if self._bar is not None:
            self._bar.update(num_bytes)
            return
        now = time.monotonic()
        if now - self._reported >= SECONDS:
            self._reported = now
            self._log(f"data: {self._line(now - self._began)}")

    def _line(self, seconds):
        """As in "tokenised 12 of 50 MB, 3.10 MB/s, 12 s left"."""
        rate = (self._done - self._skipped) / seconds
        done = f"{self._done / 1e6:,.1f}"
        if self._total is None:
            return f"{self._what} {done} MB, {rate / 1e6:.2f} MB/s"
        left = max(0, self._total - self._done) / max(rate, 1)
        return (
            f"{self._what} {done} of {self._at_most}{self._total / 1e6:,.1f} MB,"
            f" {rate / 1e6:.2f} MB/s, {self._at_most}{_duration(left)} left"
        )


def _duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
