"""`jsonl:`: a document a line, or an item of a JSON array; compressed or not."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

from qkvjax.data.compression import opened
from qkvjax.data.files import COMPRESSED_SUFFIXES, find, without_copies
from qkvjax.data.formats import Format, head_of, require_text
from qkvjax.errors import UserError, did_you_mean

_WANTED = "jsonl: takes a JSON object a line"


def open_jsonl(name: str, path: str) -> tuple[tuple[Path, ...], tuple[str, ...], list[Format]]:
    """Finds the files of `jsonl:PATH` and looks at each.

    Of a folder the names in .jsonl or .ndjson count, compressed or not; without one, those in
    .json.

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
    for file, found in zip(files, formats):
        _require_lines_or_array(file, _head(file, found))
    return files, left_out, formats


def read_jsonl(
    files: tuple[Path, ...], formats: list[Format], field: str
) -> Iterator[bytes | None]:
    """Reads the documents; None for a line whose text is null.

    Raises:
      UserError: a line that is not JSON, or has no text in this field; a damaged file.
    """
    for file, found in zip(files, formats):
        is_array = _is_array(_head(file, found))
        with opened(file) as stream:
            lines = _as_utf8(file, stream, found.encoding) if found.encoding else stream
            if is_array:
                yield from _items(file, b"".join(lines), field)
                continue
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield _text_of(_parsed(line, where, number == 1), field, where)


def as_bytes(value: str | bytes | None) -> bytes | None:
    """Returns a text as UTF-8, and None as it is.

    Raises:
      TypeError: it is no text.
    """
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise TypeError(f"it is {type(value).__name__}")
    return value.encode()


def _with_compressed(*suffixes):
    return (*suffixes, *(suffix + packed for suffix in suffixes for packed in COMPRESSED_SUFFIXES))


def _head(file, found):
    head = head_of(file)
    return head.decode(found.encoding, errors="ignore").encode() if found.encoding else head


def _as_utf8(file, stream, encoding):
    try:
        for line in io.TextIOWrapper(stream, encoding, newline="\n"):
            yield line.encode()
    except UnicodeError as error:
        raise UserError(f"{file} is no {encoding.upper()} text ({error}): convert it") from None


def _parsed(line, where, is_first):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        remedy = "correct or delete that line"
        if is_first and not line.lstrip(b"\xef\xbb\xbf \t").startswith((b"{", b"[")):
            remedy = "jsonl: takes a JSON object a line; plain text is text:PATH"
        raise UserError(f"{where}: no JSON ({error}); {remedy}") from None


def _text_of(row, field, where):
    """The document of a parsed line or item."""
    if not isinstance(row, dict) or field not in row:
        keys = list(row) if isinstance(row, dict) else []
        remedy = f"name the field with the text as jsonl:PATH#FIELD{did_you_mean(field, keys)}"
        lists = [key for key in keys if isinstance(row[key], list)]
        if lists:
            remedy += f", or write the items of a list a line each (jq -c '.{lists[0]}[]')"
        raise UserError(f"{where}: no field {field!r} among {', '.join(keys) or 'none'}; {remedy}")
    try:
        return as_bytes(row[field])
    except (TypeError, UnicodeEncodeError) as error:
        raise UserError(
            f"{where}: field {field!r} is no text ({error}); correct the line or name another"
            " field as jsonl:PATH#FIELD"
        ) from None


def _items(file, content, field):
    """The documents of a JSON array, parsed one by one; the text is in memory as a whole."""
    decoder = json.JSONDecoder()
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is a JSON array that is not UTF-8 ({error}): convert it") from None
    at = _after(text, 1)
    number = 0
    while text[at : at + 1] != "]":
        number += 1
        where = f"{file}, item {number}"
        try:
            row, at = decoder.raw_decode(text, at)
            at = _after(text, at)
            if text[at : at + 1] == ",":
                at = _after(text, at + 1)
            elif text[at : at + 1] != "]":
                raise ValueError("the array ends without ]")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: no JSON ({error}); correct it, or copy it again") from None
        yield _text_of(row, field, where)


def _after(text, at):
    """The next place that is no white space."""
    while text[at : at + 1].isspace():
        at += 1
    return at


def _first_line(head):
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")


def _is_array(head: bytes) -> bool:
    """Whether a file is one JSON array, and not lines of arrays."""
    line, _, rest = _first_line(head)
    if not line.startswith(b"["):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return not rest.strip()


def _require_lines_or_array(file, head):
    """Raises UserError for one JSON object that is written over several lines."""
    line, newline, _ = _first_line(head)
    line = line.rstrip()
    is_open = line.endswith((b"{", b"[", b",", b":")) and not line.endswith(b"},")
    if line.startswith(b"{") and newline and is_open:
        raise UserError(
            f"{file} is JSON over several lines, and {_WANTED}: write it so with jq -c . {file}, or"
            f" the items of a list FIELD with jq -c '.FIELD[]' {file}"
        )
