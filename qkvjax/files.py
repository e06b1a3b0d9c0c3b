"""Reads and writes JSON and JSONL files; a crash never leaves half a file.

"Atomic" below means that a file is first written under another name and then renamed: a reader sees
the old content or the new one.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from qkvjax.errors import UserError


def parse_object(text: bytes | str) -> dict | None:
    """Returns the JSON object in a text; None if the text is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_object(path: Path, remedy: str = "restore it from a copy") -> dict:
    """Returns the JSON object in a file.

    Args:
      path: of the file.
      remedy: end of the error message, what the user can do.

    Raises:
      UserError: the file cannot be read, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} cannot be read (there is no such file): check the path, or {remedy}"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check the path, or {remedy}"
        ) from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise UserError(f"{path} is not JSON ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: {remedy}")
    return value


def append_line(path: Path, record: Mapping) -> None:
    """Appends one JSON object as one line.

    Several processes may append to one file: a lock keeps their lines apart.

    Raises:
      UserError: the file cannot be written.
    """
    line = json.dumps(record, default=float, allow_nan=False) + "\n"
    try:
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _repair_last_line(file)
            file.write(line.encode())
    except OSError as error:
        raise unwritable(path, error) from None


def _repair_last_line(file: BinaryIO) -> None:
    """Ends the last line, or removes it if a crash cut it off in the middle.

    Without this the next line would be appended to the broken one and be lost with it.
    """
    is_empty = file.seek(0, os.SEEK_END) == 0
    if is_empty:
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
    """Returns the objects of a JSONL file; [] if the file does not exist.

    An incomplete last line, which a crash leaves, is ignored.

    Args:
      path: of the file.
      needed: keys that each object must have, with their types.

    Raises:
      UserError: a line is not a JSON object, or lacks a key.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        record = parse_object(line)
        if record is None and line.strip() and number < len(lines):
            raise UserError(f"{path}, line {number}, is not a JSON object: repair or delete it")
        if record is not None:
            require_keys(f"{path}, line {number},", record, **needed)
            records.append(record)
    return records


def require_keys(where: str, record: object, **needed: type) -> None:
    """Raises UserError unless a record is an object with certain keys.

    Args:
      where: the file, and the part of it, for the message.
      record: what was read.
      needed: keys, with the types of their values.
    """
    for key, kind in needed.items():
        if not isinstance(record, Mapping) or not isinstance(record.get(key), kind):
            raise UserError(
                f"{where} has no {key!r} of type {kind.__name__}: restore it from a copy, or"
                " delete it"
            )


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically.

    Raises:
      UserError: the file cannot be written.
    """
    _write(path, json.dumps(value, indent=1, default=float) + "\n")


def _write(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically.

    Raises:
      UserError: the file cannot be written.
    """
    # A random name, not the process id: on a network folder two machines may have equal ids.
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise unwritable(path, error) from None


def write_lines(path: Path, records: Iterable[Mapping]) -> None:
    """Writes a JSONL file atomically.

    Raises:
      UserError: the file cannot be written.
    """
    _write(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def read_json(path: Path) -> dict:
    """Returns the object in a file; {} if the file does not exist.

    For files that qkvjax writes again when they are missing: the error advises to delete them.

    Raises:
      UserError: the file cannot be read, or is not a JSON object.
    """
    if not path.exists():
        return {}
    return read_object(path, "restore it from a copy, or delete it")


def unwritable(path: Path, error: OSError) -> UserError:
    """Returns the error for a file or folder that cannot be written."""
    return UserError(f"{path} cannot be written ({error.strerror}): make room or check its folder")
