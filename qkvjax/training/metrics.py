"""Where numbers go: `metrics.jsonl`, which is the truth, TensorBoard and Weights & Biases."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import math
import os
import sys
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from qkvjax.errors import UserError, parse_object, read_object
from qkvjax.training.tensorboard import Events

WANDB_SECONDS = 10  # how long its service may take to answer; it retries for about as long again


def append_line(path: Path, record: Mapping) -> None:
    """Appends one JSON object as one line; a lock keeps the lines of several processes apart.

    Raises:
      UserError: the file cannot be written.
    """
    line = json.dumps(record, default=float, allow_nan=False) + "\n"
    try:
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _end_last_line(file)
            file.write(line.encode())
    except OSError as error:
        raise _unwritable(path, error) from None


def _end_last_line(file) -> None:
    """Cuts off a line that a crash left torn, on which the next one would be lost."""
    if not file.seek(0, os.SEEK_END):
        return
    file.seek(-1, os.SEEK_END)
    if file.read() == b"\n":
        return
    file.seek(0)
    whole, newline, last = file.read().rpartition(b"\n")
    if parse_object(last) is None:
        file.truncate(len(whole + newline))
    else:
        file.write(b"\n")


def read_lines(path: Path, **needed: type) -> list[dict]:
    """The objects of a JSONL file; a torn last line, from a crash in mid-write, is left out.

    Args:
      needed: keys that each object has, with their types.

    Raises:
      UserError: a line that is no such object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        record = parse_object(line)
        if record is None and line.strip() and number < len(lines):
            raise UserError(f"{path}, line {number}, is no JSON object: repair or delete it")
        if record is not None:
            require_keys(f"{path}, line {number},", record, **needed)
            records.append(record)
    return records


def require_keys(where: str, record: object, **needed: type) -> None:
    """Raises UserError unless `record`, read from `where`, is an object with these keys."""
    for key, kind in needed.items():
        if not isinstance(record, Mapping) or not isinstance(record.get(key), kind):
            raise UserError(
                f"{where} has no {key!r} of type {kind.__name__}: restore it from a copy, or"
                " delete it"
            )


def write_json(path: Path, value) -> None:
    """Writes a JSON file whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    _write(path, json.dumps(value, indent=1, default=float) + "\n")


def _write(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    # A name of its own: on a network folder two machines may have equal process numbers.
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise _unwritable(path, error) from None


def write_lines(path: Path, records: Iterable[Mapping]) -> None:
    """Writes a JSONL file whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    _write(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def read_json(path: Path) -> dict:
    """The object in a file that `write_json` wrote and that can be made again; {} without it.

    Raises:
      UserError: it holds something else.
    """
    return read_object(path, "restore it from a copy, or delete it") if path.exists() else {}


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written ({error.strerror}): make room or check its folder")


def check_wandb(project: str | None) -> None:
    """Raises UserError when a Weights & Biases project is named and the package is missing."""
    found = importlib.util.find_spec("wandb") if project else None
    if project and (found is None or found.origin is None):  # a folder of logs has no origin
        remedy = "pip install 'qkvjax[wandb]', or unset it"
        raise UserError(f"train.wandb needs Weights & Biases: {remedy}")


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers as JSON has them: NaN and infinity are None."""
    return {name: float(v) if math.isfinite(v) else None for name, v in values.items()}


def _start_wandb(project: str, workdir: Path, config: Mapping):
    """A run of Weights & Biases; one that is kept in the workdir where the service does not answer.

    A run must not wait for a service that only shows it, nor end because of it.
    """
    import wandb

    where = {"project": project, "dir": str(workdir), "config": config, "resume": "allow"}
    try:
        return wandb.init(**where, settings={"init_timeout": WANDB_SECONDS})
    except (wandb.Error, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    print(
        f"Weights & Biases does not answer ({reason[:200]}): the run goes on and keeps its record"
        f" in {workdir}/wandb, which `wandb sync` uploads later. WANDB_MODE=offline does so from"
        " the start; `wandb login` or WANDB_API_KEY gives the key",
        file=sys.stderr,
        flush=True,
    )
    os.environ["WANDB_MODE"] = "offline"  # also for what begins later in this process
    return wandb.init(**where, mode="offline")


class Metrics:
    """The metrics of one run.

    Args:
      workdir: where `metrics.jsonl` and the TensorBoard events go.
      start: the step the run goes on from; later lines, written before a crash, are dropped, so
        that no step stands twice.
      config: the resolved configuration, shown by Weights & Biases where it names a project.
    """

    def __init__(self, workdir: Path, start: int = 0, config: Mapping | None = None):
        self.path = workdir / "metrics.jsonl"
        kept = [record for record in read_lines(self.path, step=int) if record["step"] <= start]
        if self.path.exists():
            write_lines(self.path, kept)
        try:
            self._events = Events(workdir / "tensorboard", start)
        except OSError as error:
            raise _unwritable(workdir / "tensorboard", error) from None
        self._wandb, project = None, config and config["train"]["wandb"]
        if project:
            self._wandb = _start_wandb(project, workdir, config)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of plain numbers; NaN and infinity are written as null."""
        append_line(self.path, {"step": step, **_plain(values)})
        self._show(step, values)

    def amend(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers to the last line, which is that of `step`, or writes a line of them.

        The file is replaced as a whole, so that it has each step once whatever happens.
        """
        lines = read_lines(self.path, step=int)
        if not lines or lines[-1]["step"] != step:
            lines.append({"step": step})
        lines[-1] |= _plain(values)
        write_lines(self.path, lines)
        self._show(step, values)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        """Sends numbers to TensorBoard and, where it is asked for, Weights & Biases."""
        plain = _plain(values)
        try:
            self._events.scalars(step, {k: v for k, v in plain.items() if v is not None})
        except OSError as error:
            raise _unwritable(self.path.with_name("tensorboard"), error) from None
        if self._wandb:
            self._wandb.log(plain, step=step)

    def close(self) -> None:
        """Ends what is open."""
        self._events.close()
        if self._wandb:
            self._wandb.finish()
