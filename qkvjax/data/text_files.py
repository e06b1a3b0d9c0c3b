"""`text:`: a document a file, in any encoding that a byte-order mark names, compressed or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qkvjax.data.compression import opened
from qkvjax.data.files import expanded, find, listed, without_copies
from qkvjax.data.formats import Format, look, refusal
from qkvjax.errors import UserError

_WANTED = "text: takes text"


def open_text(name: str, path: str) -> tuple[tuple[Path, ...], tuple[str, ...], list[Format]]:
    """Finds the text files of `text:PATH` and looks at each.

    A file that is named has to be text. Of a folder or a glob, what is not text is left out.

    Returns:
      (files, what was left out and why, formats of the files).

    Raises:
      UserError: nothing is there, or nothing that is text.
    """
    files, left_out = without_copies(find(name, path))
    formats = [look(file) for file in files]
    if expanded(path).is_file() and not formats[0].is_text:
        raise refusal(files[0], formats[0], _WANTED)
    kept = [(file, found) for file, found in zip(files, formats) if found.is_text]
    others = [(file, found) for file, found in zip(files, formats) if not found.is_text]
    _refuse_tables(name, kept, others)
    left_out += tuple(f"{file.name} ({found.name})" for file, found in others)
    if not kept:
        file, found = others[0]
        raise UserError(
            f"data.source={name!r}: none of {len(files):,} files is text ({listed(left_out)}), and"
            f" {_WANTED}: {found.remedy.replace('PATH', str(file))}"
        )
    return tuple(file for file, _ in kept), left_out, [found for _, found in kept]


def read_text(files: tuple[Path, ...], formats: list[Format]) -> Iterator[bytes]:
    """Reads files as documents; what has a byte-order mark of UTF-16 or UTF-32 becomes UTF-8.

    Raises:
      UserError: a damaged file.
    """
    for file, found in zip(files, formats):
        with opened(file) as stream:
            content = stream.read()
        if found.encoding:
            try:
                content = content.decode(found.encoding).encode()
            except UnicodeError as error:
                raise UserError(
                    f"{file} starts as {found.name} and is not ({error}): copy it again, or convert"
                    " it to UTF-8"
                ) from None
        yield content


def _refuse_tables(name, kept, others):
    """Raises UserError where texts lie beside more data, as a card beside a data set does."""
    data = [(file, found) for file, found in others if found.remedy.startswith("use ")]
    if sum(file.stat().st_size for file, _ in data) > sum(file.stat().st_size for file, _ in kept):
        raise refusal(*data[0], f"{name} names few texts beside such files")
