"""The folder of a run or a study: makes it, checks it, and locks it for one process."""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qkvjax.errors import UserError


def open_workdir(workdir: str | None) -> Path:
    """Returns the workdir as a path, and makes the folder if it does not exist.

    Raises:
      UserError: there is no name, it has unprintable characters, or the folder cannot be written.
    """
    if not workdir:
        raise UserError("--workdir=DIR is missing: where should the run be kept?")
    path = Path(workdir)
    if not workdir.isprintable():  # Orbax and TensorBoard accept UTF-8 only
        raise UserError(f"--workdir={workdir!r} has characters that cannot be printed: rename it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        # A file without a name: other processes may test the same folder at the same time.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be written ({error.strerror}): choose another with"
            " --workdir"
        ) from None
    return path


@contextlib.contextmanager
def only_one(workdir: Path) -> Iterator[None]:
    """Locks a workdir for this process; the system releases the lock when the process ends.

    Raises:
      UserError: another process has the lock.
    """
    with open(workdir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is at work in {workdir}: wait for it, stop it, or choose another"
                " --workdir"
            ) from None
        yield
