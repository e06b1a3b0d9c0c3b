"""A run that does not go on ends by itself, with what every thread was doing.

JAX notices a process that is gone, by its heartbeat, but not one whose Python hangs: the others
would wait for it for ever. Each process watches itself; those that wait for a hung one hang too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from qkvjax.parallel.distributed import STALLED

# Seconds between a process's stack traces and its end, so that all of a job write theirs: when
# process 0 ends, JAX ends the others.
GRACE = 5


@contextlib.contextmanager
def watchdog(seconds: float, start: float) -> Iterator[Callable[..., None]]:
    """Yields a function to be called at each sign of progress, with `starting=True` at those before
    the first step, such as a part of the data that is prepared.

    Without one for `seconds` the process writes its stack traces to stderr and exits with STALLED.
    Python that holds its lock for ever (a hung call into a driver, say) is ended by the system's
    timer after as long again, with code 1.

    Args:
      seconds: 0 watches nothing.
      start: how long the first sign may take, and the one after a sign of the start: restoring and
        compiling lie between.
    """
    if not seconds:
        yield lambda starting=False: None
        return
    deadline = [time.monotonic() + max(start, seconds)]
    over = threading.Event()

    def sign(starting: bool = False) -> None:
        deadline[0] = time.monotonic() + (max(start, seconds) if starting else seconds)

    def watch() -> None:
        while not over.wait(min(max(deadline[0] - time.monotonic(), 0.05), 1.0)):
            left = deadline[0] - time.monotonic()
            later = max(left, 1) + seconds + GRACE
            faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__)
            if left <= 0:
                _give_up(seconds)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield sign
    finally:
        over.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()


def _give_up(seconds: float) -> None:
    print(
        f"stalled: no step, evaluation or save ended within {seconds:g} s; what this process was"
        " doing:",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    sys.stdout.flush()
    time.sleep(GRACE)
    os._exit(STALLED)
