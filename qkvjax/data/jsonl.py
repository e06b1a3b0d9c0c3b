"""`jsonl:`: one document for each line, or for each item of a JSON array; compressed or not."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from qkvjax.data.compression import opened
from qkvjax.data.files import COMPRESSED_SUFFIXES, find, without_copies
from qkvjax.data.formats import Format, read_head, require_text
from qkvjax.errors import UserError, did_you_mean

_UTF8_MARK = b"\xef\xbb\xbf"
_WANTED = "jsonl: takes a JSON object a line"


def open_jsonl(name: str, path: str) -> tuple[tuple[Path, ...], tuple[str, ...], list[Format]]:
    """Finds the files of `jsonl:PATH` and checks the format of each.

    In a folder these are the files in .jsonl or .ndjson, compressed or not; if there are none,
    those in .json.

    Returns:
      (files, what was left out and why, formats of the files).

    Raises:
      UserError: nothing is there, or another format.
    """
    try:
        files = find(name, path, _with_compressed(".jsonl", ".ndjson"))
    except UserError as error:
        try:
            files = find(name, path, _with_compressed(".json"))
        except UserError:
            raise error from None
    files, left_out = without_copies(files)
    formats = [require_text(file, _WANTED) for file in files]
    for file, form in zip(files, formats):
        _refuse_indented_object(file, _read_head_as_utf8(file, form))
    return files, left_out, formats


def read_jsonl(
    files: tuple[Path, ...], formats: list[Format], field: str
) -> Iterator[bytes | None]:
    """Reads the documents; None for a line whose text is null.

    Raises:
      UserError: a line that is not JSON, or has no text in this field; a damaged file.
    """
    for file, form in zip(files, formats):
        is_array = _is_array(_read_head_as_utf8(file, form))
        with opened(file) as stream:
            lines = _as_utf8(file, stream, form.encoding) if form.encoding else stream
            if is_array:
                yield from _read_items(file, b"".join(lines), field)
            else:
                yield from _read_lines(file, lines, field)


def as_bytes(value: str | bytes | None) -> bytes | None:
    """Returns a text as UTF-8; bytes and None as they are.

    Raises:
      TypeError: the value is not text.
    """
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise TypeError(f"it is {type(value).__name__}")
    return value.encode()


def _with_compressed(*suffixes: str) -> tuple[str, ...]:
    """Returns the suffixes, and each with the suffix of a compressed file after it."""
    compressed = (suffix + last for suffix in suffixes for last in COMPRESSED_SUFFIXES)
    return (*suffixes, *compressed)


def _read_head_as_utf8(file: Path, form: Format) -> bytes:
    head = read_head(file)
    if not form.encoding:
        return head
    return head.decode(form.encoding, errors="ignore").encode()


def _as_utf8(file: Path, stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    try:
        for line in io.TextIOWrapper(stream, encoding, newline="\n"):
            yield line.encode()
    except UnicodeError as error:
        raise UserError(f"{file} is not {encoding.upper()} text ({error}): convert it") from None


def _read_lines(file: Path, lines: Iterable[bytes], field: str) -> Iterator[bytes | None]:
    """Yields the document of each line that is not blank."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{file}, line {number}"
            yield _document_of(_parse_line(line, where, is_first=number == 1), field, where)


def _parse_line(line: bytes, where: str, is_first: bool) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        remedy = "correct or delete that line"
        if is_first and not line.lstrip(_UTF8_MARK + b" \t").startswith((b"{", b"[")):
            remedy = "jsonl: takes a JSON object a line; plain text is text:PATH"
        raise UserError(f"{where}: not JSON ({error}); {remedy}") from None


def _read_items(file: Path, content: bytes, field: str) -> Iterator[bytes | None]:
    """Yields the document of each item of a JSON array.

    The items are parsed one by one; the text of the file is in memory as a whole.
    """
    decoder = json.JSONDecoder()
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is a JSON array that is not UTF-8 ({error}): convert it") from None
    position = _skip_space(text, 1)
    number = 0
    while text[position : position + 1] != "]":
        number += 1
        where = f"{file}, item {number}"
        try:
            row, position = decoder.raw_decode(text, position)
            position = _skip_space(text, position)
            next_character = text[position : position + 1]
            if next_character == ",":
                position = _skip_space(text, position + 1)
            elif next_character != "]":
                raise ValueError("the array ends without ]")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); correct it, or copy it again") from None
        yield _document_of(row, field, where)


def _skip_space(text: str, position: int) -> int:
    """Returns the next position that is not white space."""
    while text[position : position + 1].isspace():
        position += 1
    return position


def _document_of(row: object, field: str, where: str) -> bytes | None:
    """Returns the document of a parsed line or item."""
    if not isinstance(row, dict) or field not in row:
        raise _missing_field(row, field, where)
    try:
        return as_bytes(row[field])
    except (TypeError, UnicodeEncodeError) as error:
        raise UserError(
            f"{where}: field {field!r} is not text ({error}); correct the line or name another"
            " field as jsonl:PATH#FIELD"
        ) from None


def _missing_field(row: object, field: str, where: str) -> UserError:
    keys = list(row) if isinstance(row, dict) else []
    remedy = f"name the field with the text as jsonl:PATH#FIELD{did_you_mean(field, keys)}"
    lists = [key for key in keys if isinstance(row[key], list)]
    if lists:
        remedy += f", or write the items of a list a line each (jq -c '.{lists[0]}[]')"
    return UserError(f"{where}: no field {field!r} among {', '.join(keys) or 'none'}; {remedy}")


def _first_line(head: bytes) -> tuple[bytes, bytes, bytes]:
    """Returns (first line, line end, the rest)."""
    return head.removeprefix(_UTF8_MARK).lstrip().partition(b"\n")


def _is_array(head: bytes) -> bool:
    """Returns whether a file is one JSON array, and not lines of arrays."""
    line, _, rest = _first_line(head)
    if not line.startswith(b"["):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True  # the array continues on the next lines, or beyond the head
    return not rest.strip()


def _refuse_indented_object(file: Path, head: bytes) -> None:
    """Raises UserError for a JSON object that is written over several lines."""
    line, newline, _ = _first_line(head)
    line = line.rstrip()
    is_open = line.endswith((b"{", b"[", b",", b":")) and not line.endswith(b"},")
    if line.startswith(b"{") and newline and is_open:
        raise UserError(
            f"{file} is JSON over several lines, and {_WANTED}: write it so with jq -c . {file}, or"
            f" the items of a list FIELD with jq -c '.FIELD[]' {file}"
        )
