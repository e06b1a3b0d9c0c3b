"""Reading and writing JSON and JSONL files, whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from qkvjax.errors import UserError


def parse_object(text: bytes | str) -> dict | None:
    """The JSON object of a text, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_object(path: Path, remedy: str = "restore it from a copy") -> dict:
    """The JSON object in a file.

    Raises:
      UserError: it cannot be read, or holds something else; `remedy` says what helps.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} cannot be read (there is no such file): check the path, or {remedy}"
        ) from None
    except OSError as error:
        why = f"{path} cannot be read ({error.strerror})"
        raise UserError(f"{why}: check the path, or {remedy}") from None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is no JSON ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object: {remedy}")
    return value


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
        raise unwritable(path, error) from None


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
        raise unwritable(path, error) from None


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


def unwritable(path: Path, error: OSError) -> UserError:
    """Returns the error of a file or folder that cannot be written."""
    return UserError(f"{path} cannot be written ({error.strerror}): make room or check its folder")
