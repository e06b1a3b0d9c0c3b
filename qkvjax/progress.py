"""Progress of long work, for the user and for the watchdog."""

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


@contextlib.contextmanager
def progress(
    what: str,
    total: float,
    unit: str,
    *,
    log: Callable[[str], None] | None = None,
    alive: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[float], None]]:
    """Yields a function to be called with the amount of work that was done since the last call.

    On a terminal a bar shows how far the work is, from its fifth second on. Elsewhere a line says
    so every SECONDS_BETWEEN_LINES, with speed and time left.

    Args:
      what: the work, such as "scoring".
      total: amount of work in all; 0 where it is not known.
      unit: of the amount, in the plural, such as "windows".
      log: gets the lines; None shows nothing, neither bar nor lines.
      alive: is called at each call, for the watchdog.
    """
    bar = None
    if log is not None and sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(total=total or None, desc=what, unit=f" {unit}", leave=False, delay=5)
    began = time.monotonic()
    last_line = began
    done = 0.0

    def advance(amount: float) -> None:
        nonlocal done, last_line
        done += amount
        alive()
        if bar is not None:
            bar.update(amount)
            return
        now = time.monotonic()
        if log is None or now - last_line < SECONDS_BETWEEN_LINES:
            return
        last_line = now
        speed = done / (now - began)
        line = f"{what}: {done:,.0f} {unit}, {speed:,.4g} {unit} a second"
        if total:
            line = f"{what}: {done:,.0f} of {total:,.0f} {unit}, {speed:,.4g} {unit} a second"
            if speed:
                line += f", {duration(max(0.0, total - done) / speed)} left"
        log(line)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


@contextlib.contextmanager
def working(
    what: str,
    *,
    log: Callable[[str], None],
    alive: Callable[[], None] = lambda: None,
    limit: float = 3600.0,
) -> Iterator[None]:
    """Shows that one long call, such as compiling, lives: a line every SECONDS_BETWEEN_LINES.

    Args:
      what: the work, such as "compiling".
      log: gets the lines.
      alive: is called every second, for the watchdog.
      limit: seconds after which `alive` is called no more, so that a call that hangs ends.
    """
    over = threading.Event()
    began = time.monotonic()

    def watch() -> None:
        next_line = SECONDS_BETWEEN_LINES
        while not over.wait(1.0):
            passed = time.monotonic() - began
            if passed < limit:
                alive()
            if passed >= next_line:
                log(f"{what}: {duration(passed)} so far")
                next_line += SECONDS_BETWEEN_LINES

    thread = threading.Thread(target=watch, name=what, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
