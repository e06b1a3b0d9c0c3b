"""Being asked to stop: a signal is noted, and the loop saves and ends after the step it is in."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from qkvjax.errors import UserError

INTERRUPTED, PREEMPTED = 130, 42  # exit codes


class Stopped(UserError):
    """Stopped by a signal, and saved; `code` is the exit code."""

    label = "stopped"


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Notes SIGINT and SIGTERM; yields a function that gives the exit code asked for, or None.

    The second SIGINT raises KeyboardInterrupt at once. Outside the main thread Python takes no
    signals, and nothing is noted.
    """
    asked: list[int] = []

    def note(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(INTERRUPTED if number == signal.SIGINT else PREEMPTED)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
