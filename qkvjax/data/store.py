"""The data folder: what is prepared once and found again."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from qkvjax.errors import UserError

_BEAT = 2.0  # seconds between the signs of life of a process that prepares
_LOOK = 0.2  # and between two looks of one that waits


def data_folder() -> Path:
    """$QKVJAX_DATA_DIR, else ~/.cache/qkvjax/data.

    Raises:
      UserError: there is no home folder, or no such user's.
    """
    name = os.environ.get("QKVJAX_DATA_DIR") or "~/.cache/qkvjax/data"
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(
            f"prepared data have no folder: {name} names a home folder, and there is none (HOME is"
            " unset, and the system does not know the user): set QKVJAX_DATA_DIR to a folder that"
            " can be written, or set HOME"
        ) from None


def find_or_make(name: str, make: Callable[[Path], None]) -> Path:
    """As `find_or_go_on`, for what is made so quickly that nothing of it is kept."""

    def anew(partial, alive):
        for remains in partial.iterdir():
            remains.unlink()
        make(partial)

    return find_or_go_on(name, anew)


def find_or_go_on(
    name: str,
    make: Callable[[Path, Callable[[], None]], None],
    alive: Callable[[], None] = lambda: None,
) -> Path:
    """The folder `name` of the data folder, filled by `make` if it does not exist.

    `make(partial, alive)` fills another folder, which is renamed when it is complete, so that a
    folder that exists is whole. The partial folder of a process that was stopped is given to the
    next one as it is. One process at a time prepares and the others wait: they want a lock, which
    the system frees when a process dies, and learn from the time of its file that the work goes on.

    Args:
      alive: called while the work goes on, here or in the process that is waited for.

    Raises:
      UserError: the data folder cannot be written, or `make` could not read or write a file.
    """
    root = data_folder()
    folder = root / name
    if folder.is_dir():
        return folder
    lock_file = root / f".{name}.lock"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(lock_file, "a")
    except OSError as error:
        raise UserError(
            f"the data folder {root} cannot be written ({error.strerror}): set QKVJAX_DATA_DIR to"
            " a folder with room for it"
        ) from None
    with lock:
        locked = _lock(lock, folder, alive)
        if folder.is_dir():
            return folder
        # Without a lock others may be at work too: each in a folder of its own.
        partial = root / (f".{name}.partial" if locked else f".{name}.{uuid.uuid4().hex}.partial")
        partial.mkdir(exist_ok=True)
        over = False
        try:
            make(partial, _beating(lock_file, alive))
            _rename(partial, folder)
            over = True
        except UserError:
            over = True  # the input is refused, so the same preparation will not go on
            raise
        except OSError as error:
            raise UserError(
                f"preparing data in {root} failed ({error}): check that what it reads can be read,"
                " and that the folder has room, or set QKVJAX_DATA_DIR to one that has"
            ) from error
        finally:
            if over or not locked or not any(partial.iterdir()):
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _lock(lock, folder, alive) -> bool:
    """Waits for the lock, or for the folder; False where the file system has no locks."""
    seen = None
    while not folder.is_dir():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            beat = os.fstat(lock.fileno()).st_mtime_ns
            if beat != seen:
                alive()
            seen = beat
            time.sleep(_LOOK)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                return False
            raise
    return True


def _beating(lock_file, alive) -> Callable[[], None]:
    """`alive`, which also tells processes that wait."""
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        alive()
        now = time.monotonic()
        if now - last >= _BEAT:
            last = now
            os.utime(lock_file)

    return beat


def _rename(partial, folder):
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process, without a lock, was quicker
            raise


def damaged(folder: Path, error: Exception) -> UserError:
    """What is said of a prepared copy that cannot be read."""
    return UserError(
        f"the prepared data in {folder} is damaged ({type(error).__name__}): delete that folder,"
        " and it is made again"
    )
