"""The folder of a run or a study: made, checked, and held by one process."""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
from pathlib import Path

from qkvjax.errors import UserError


def open_workdir(workdir: str | None) -> Path:
    """The workdir as a folder that can be written to; made when absent."""
    if not workdir:
        raise UserError("--workdir=DIR is missing: where should the run be kept?")
    path = Path(workdir)
    if not workdir.isprintable():  # Orbax and TensorBoard take UTF-8 only
        raise UserError(f"--workdir={workdir!r} holds characters that cannot be printed: rename it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # a name of its own: others may be probing too
            pass
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be written ({error.strerror}): choose another with"
            " --workdir"
        ) from None
    return path


@contextlib.contextmanager
def only_one(workdir: Path):
    """Holds a workdir for this process; the system frees it when the process ends, however.

    Raises:
      UserError: another process holds it.
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
