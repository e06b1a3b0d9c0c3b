"""Keeps off stderr what Orbax's threads write about errors that they hand on as well."""

from __future__ import annotations

import functools
import logging
import sys
import threading
from pathlib import Path


@functools.cache
def saving() -> None:
    """For the rest of the process: an error of saving is told once, by who waits for the save."""
    logging.getLogger("absl").addFilter(
        lambda record: not (record.exc_info and "orbax" in Path(record.pathname).parts)
    )
    # Of arrays that were written at the same time as the first that failed.
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    of_threads, unraisable = threading.excepthook, sys.unraisablehook

    def thread_hook(args) -> None:
        if not type(args.thread).__module__.startswith("orbax."):
            of_threads(args)

    def unraisable_hook(told) -> None:
        # Array writes that end after the first has failed find their event loop closed.
        if str(told.exc_value) != "Event loop is closed":
            unraisable(told)

    threading.excepthook, sys.unraisablehook = thread_hook, unraisable_hook
