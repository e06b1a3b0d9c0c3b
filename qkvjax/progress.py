"""Reports the progress of long work to the user and to the watchdog.

The watchdog ends a process that shows no sign of life for too long; `alive` is such a sign.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LINES = 30.0


def duration(seconds: float) -> str:
    """Writes seconds for people: "48 s", "3 min 20 s", "2 h 05 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """Counts work that is done and shows it; to be used in a `with` statement.

    On a terminal it is a bar, which appears after two seconds. Elsewhere it is a line every
    SECONDS_BETWEEN_LINES, with speed and time left.

    Args:
      what: the work, such as "scoring".
      total: amount of work in all; 0 if it is not known.
      unit: of the amount, such as "labels" or "MB".
      log: is called with each line; None shows neither lines nor a bar.
      alive: is called at each `add`, for the watchdog.
      at_most: whether the total is only an upper limit.
    """

    def __init__(
        self,
        what: str,
        total: float,
        unit: str,
        *,
        log: Callable[[str], None] | None = None,
        alive: Callable[[], None] = lambda: None,
        at_most: bool = False,
    ):
        self._what = what
        self._total = total
        self._unit = unit
        self._log = log
        self._alive = alive
        self._at_most = "at most " if at_most else ""
        self._done = 0.0
        self._skipped = 0.0
        self._began = time.monotonic()
        self._last_line = self._began
        self._bar = None

    def __enter__(self) -> Progress:
        if self._log is not None and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self._what,
                total=self._total or None,
                unit=f" {self._unit}",
                leave=False,
                delay=2,
            )
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, amount: float, skipped: bool = False) -> None:
        """Counts work that is done.

        Args:
          amount: of work, in `unit`.
          skipped: whether it was done in an earlier run, so that it does not count for the speed.
        """
        self._alive()
        self._done += amount
        if skipped:
            self._skipped += amount
        if self._bar is not None:
            self._bar.update(amount)
            return
        now = time.monotonic()
        if self._log is not None and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._log(self._line(now - self._began))

    def _line(self, seconds: float) -> str:
        """Returns a line such as "scoring: 12 of 50 labels, 3.1 labels a second, 12 s left"."""
        speed = (self._done - self._skipped) / max(seconds, 1e-9)
        done = f"{self._what}: {self._done:,.0f}"
        pace = f"{speed:,.3g} {self._unit} a second"
        if not self._total:
            return f"{done} {self._unit}, {pace}"
        line = f"{done} of {self._at_most}{self._total:,.0f} {self._unit}, {pace}"
        if not speed:
            return line
        left = max(0.0, self._total - self._done) / speed
        return f"{line}, {self._at_most}{duration(left)} left"


@contextlib.contextmanager
def working(
    what: str,
    *,
    log: Callable[[str], None],
    alive: Callable[[], None] = lambda: None,
    limit: float = 3600.0,
) -> Iterator[None]:
    """Reports one long call, such as compiling, from a thread beside it.

    Args:
      what: the work, such as "compiling".
      log: is called with a line every SECONDS_BETWEEN_LINES.
      alive: is called every second, for the watchdog.
      limit: seconds after which `alive` is not called any more, so that the watchdog can end a call
        that hangs.
    """
    finished = threading.Event()
    began = time.monotonic()

    def report() -> None:
        next_line = SECONDS_BETWEEN_LINES
        while not finished.wait(1.0):
            seconds = time.monotonic() - began
            if seconds < limit:
                alive()
            if seconds >= next_line:
                log(f"{what}: {duration(seconds)} so far")
                next_line += SECONDS_BETWEEN_LINES

    thread = threading.Thread(target=report, name=what, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
