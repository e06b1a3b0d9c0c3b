"""The data folder: what is prepared once and found again."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from qkvjax.errors import UserError


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
    """The folder `name` of the data folder, filled by `make` if it is not there.

    `make` fills another folder, which is renamed when it is complete, so that a folder that
    exists is whole. A lock makes other processes wait and then find it; the system frees the
    lock of a process that dies.

    Raises:
      UserError: the data folder cannot be written, or `make` could not read or write a file.
    """
    root = data_folder()
    folder = root / name
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / f".{name}.lock", "w")
    except OSError as error:
        raise UserError(
            f"the data folder {root} cannot be written ({error.strerror}): set QKVJAX_DATA_DIR to"
            " a folder with room for it"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        partial = root / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that died
        partial.mkdir()
        try:
            make(partial)
            partial.rename(folder)
        except OSError as error:
            raise UserError(
                f"preparing data in {root} failed ({error}): check that what it reads can be read,"
                " and that the folder has room, or set QKVJAX_DATA_DIR to one that has"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def damaged(folder: Path, error: Exception) -> UserError:
    """What is said of a prepared copy that cannot be read."""
    return UserError(
        f"the prepared data in {folder} is damaged ({type(error).__name__}): delete that folder,"
        " and it is made again"
    )
