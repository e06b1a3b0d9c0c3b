"""`text:`: one document for each file, in UTF-8 or with a byte-order mark, compressed or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qkvjax.data.compression import opened
from qkvjax.data.files import expanded, find, listed, without_copies
from qkvjax.data.formats import Format, format_of, wrong_format
from qkvjax.errors import UserError

_WANTED = "text: takes text"


def open_text(name: str, path: str) -> tuple[tuple[Path, ...], tuple[str, ...], list[Format]]:
    """Finds the text files of `text:PATH` and checks the format of each.

    A file that the path names has to be text. Of a folder or a glob, other files are left out.

    Returns:
      (files, what was left out and why, formats of the files).

    Raises:
      UserError: nothing is there, or no file is text.
    """
    files, left_out = without_copies(find(name, path))
    formats = [format_of(file) for file in files]
    if expanded(path).is_file() and not formats[0].is_text:
        raise wrong_format(files[0], formats[0], _WANTED)
    texts = [(file, form) for file, form in zip(files, formats) if form.is_text]
    others = [(file, form) for file, form in zip(files, formats) if not form.is_text]
    _refuse_data_sets(name, texts, others)
    left_out += tuple(f"{file.name} ({form.name})" for file, form in others)
    if not texts:
        file, form = others[0]
        raise UserError(
            f"data.source={name!r}: none of {len(files):,} files is text ({listed(left_out)}), and"
            f" {_WANTED}: {form.remedy.replace('PATH', str(file))}"
        )
    return tuple(file for file, _ in texts), left_out, [form for _, form in texts]


def read_text(files: tuple[Path, ...], formats: list[Format]) -> Iterator[bytes]:
    """Reads files as documents; UTF-16 and UTF-32 with a byte-order mark become UTF-8.

    Raises:
      UserError: a damaged file.
    """
    for file, form in zip(files, formats):
        with opened(file) as stream:
            content = stream.read()
        if form.encoding:
            try:
                content = content.decode(form.encoding).encode()
            except UnicodeError as error:
                raise UserError(
                    f"{file} starts as {form.name} and is not ({error}): copy it again, or convert"
                    " it to UTF-8"
                ) from None
        yield content


def _refuse_data_sets(
    name: str, texts: list[tuple[Path, Format]], others: list[tuple[Path, Format]]
) -> None:
    """Raises UserError where a larger data set lies beside the texts.

    Such texts describe the data set, as its card does, and are not what the user means.
    """
    data = [(file, form) for file, form in others if form.remedy.startswith("use ")]
    data_bytes = sum(file.stat().st_size for file, _ in data)
    text_bytes = sum(file.stat().st_size for file, _ in texts)
    if data_bytes > text_bytes:
        file, form = data[0]
        raise wrong_format(file, form, f"{name} names few texts beside such files")
