"""The data folder: what is prepared once, and found again by later runs."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from qkvjax.errors import UserError

_HEARTBEAT_SECONDS = 2.0  # between the signs of life of a process that prepares
_POLL_SECONDS = 0.2  # between two checks of a process that waits for another
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def data_folder() -> Path:
    """Returns $QKVJAX_DATA_DIR, or ~/.cache/qkvjax/data.

    Raises:
      UserError: the path names a home folder that does not exist.
    """
    name = os.environ.get("QKVJAX_DATA_DIR") or "~/.cache/qkvjax/data"
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(
            f"there is no folder for prepared data: {name} names a home folder, and there is none"
            " (HOME is unset, and the system does not know the user): set QKVJAX_DATA_DIR to a"
            " folder that can be written, or set HOME"
        ) from None


def find_or_make(name: str, make: Callable[[Path], None]) -> Path:
    """Returns the folder `name` of the data folder; `make` fills it if it does not exist.

    This is `find_or_resume` for short work: what a stopped process left is deleted.
    """

    def start_again(partial: Path, alive: Callable[[], None]) -> None:
        for remains in partial.iterdir():
            remains.unlink()
        make(partial)

    return find_or_resume(name, start_again)


def find_or_resume(
    name: str,
    make: Callable[[Path, Callable[[], None]], None],
    alive: Callable[[], None] = lambda: None,
) -> Path:
    """Returns the folder `name` of the data folder; `make` fills it if it does not exist.

    `make(partial, alive)` fills another folder, which is renamed at the end, so a folder of this
    name is always complete. When a process is stopped, the next one gets its partial folder and
    resumes. One process prepares at a time, and the others wait. They wait for a lock, which the
    system frees when a process dies; the modification time of the lock file tells them that the
    work goes on.

    Args:
      make: calls its second argument again and again while it works.
      alive: called while the work goes on, here or in another process.

    Raises:
      UserError: the data folder cannot be written, or `make` could not read or write a file.
    """
    root = data_folder()
    folder = root / name
    if folder.is_dir():
        return folder
    lock_path = root / f".{name}.lock"
    with _open_lock(lock_path) as lock:
        is_locked = _wait_for_lock(lock, folder, alive)
        if folder.is_dir():
            return folder
        # Without a lock, other processes may prepare too, so each uses a folder of its own.
        partial_name = name if is_locked else f"{name}.{uuid.uuid4().hex}"
        partial = root / f".{partial_name}.partial"
        partial.mkdir(exist_ok=True)
        with _os_errors_as_user_errors(root), _delete_unless_resumable(partial, is_locked):
            make(partial, _heartbeat(lock_path, alive))
            _rename(partial, folder)
    return folder


def damaged(folder: Path, error: Exception) -> UserError:
    """Returns the error about a prepared copy that cannot be read."""
    return UserError(
        f"the prepared data in {folder} is damaged ({type(error).__name__}): delete that folder,"
        " and it is made again"
    )


def _open_lock(path: Path) -> TextIO:
    """Opens the lock file, and makes the data folder."""
    root = path.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        return open(path, "a")
    except OSError as error:
        raise UserError(
            f"the data folder {root} cannot be written ({error.strerror}): set QKVJAX_DATA_DIR to"
            " a folder with room for it"
        ) from None


def _wait_for_lock(lock: TextIO, folder: Path, alive: Callable[[], None]) -> bool:
    """Waits for the lock, or for the folder to exist.

    Returns:
      False if the file system has no locks.
    """
    last_heartbeat = None
    while not folder.is_dir():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            heartbeat = os.fstat(lock.fileno()).st_mtime_ns
            if heartbeat != last_heartbeat:
                alive()
            last_heartbeat = heartbeat
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            raise
    return True


@contextmanager
def _delete_unless_resumable(partial: Path, is_locked: bool) -> Iterator[None]:
    """Deletes the partial folder at the end, unless another process can resume from it.

    It is kept when the work was stopped, or failed in a way that may not occur again.
    """
    is_final = False
    try:
        yield
        is_final = True
    except UserError:
        is_final = True  # the input is refused, and will be refused again
        raise
    finally:
        if is_final or not is_locked or not any(partial.iterdir()):
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _os_errors_as_user_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"preparing data in {root} failed ({error}): check that what it reads can be read,"
            " and that the folder has room, or set QKVJAX_DATA_DIR to one that has"
        ) from error


def _heartbeat(lock_path: Path, alive: Callable[[], None]) -> Callable[[], None]:
    """Returns a function that calls `alive` and shows waiting processes that the work goes on."""
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        alive()
        now = time.monotonic()
        if now - last >= _HEARTBEAT_SECONDS:
            last = now
            os.utime(lock_path)

    return beat


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # without a lock, another process may have been quicker
            raise
