"""Being asked to save or to stop: a signal is noted, and the loop obeys after the step it is in."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from qkvjax.errors import UserError

INTERRUPTED, PREEMPTED = 130, 42  # exit codes
SAVE, TIME_IS_UP = 1, 2  # requests that are no exit codes; of several the largest counts


class Stopped(UserError):
    """Stopped by a signal, and saved; `code` is the exit code."""

    label = "stopped"
    agreed = True


@contextlib.contextmanager
def requests() -> Iterator[Callable[[], int]]:
    """Notes SIGINT, SIGTERM and SIGUSR1; yields a function that gives what is asked for: an exit
    code, SAVE (once for each signal), or 0.

    The second SIGINT raises KeyboardInterrupt at once. Outside the main thread Python takes no
    signals, and nothing is noted.
    """
    asked: set[int] = set()
    meaning = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED, signal.SIGUSR1: SAVE}

    def note(number, frame):
        if number == signal.SIGINT and INTERRUPTED in asked:
            raise KeyboardInterrupt
        asked.add(meaning[number])

    def largest() -> int:
        found = max(asked, default=0)
        asked.discard(SAVE)
        return found

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, note) for number in meaning}
    try:
        yield largest
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
