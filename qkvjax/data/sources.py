"""Where documents come from: `data.source`, as bytes in a fixed order.

One function a kind. It finds the files at once (a missing path is told before anything is
read) and gives a generator that reads them document by document.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qkvjax.data import tfds_source
from qkvjax.errors import UserError, did_you_mean

# Parts of the standard library that hold tests and packages of others.
STDLIB_SKIPPED = frozenset(
    "site-packages dist-packages test tests idlelib lib2to3 turtledemo __pycache__".split()
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents, read anew by each call of `documents`.

    Attributes:
      name: as in the configuration.
      files: what is read, in order.
      read: yields the documents, empty ones too.
    """

    name: str
    files: tuple[Path, ...]
    read: Callable[[], Iterable[bytes]] = dataclasses.field(repr=False)

    def documents(self) -> Iterator[bytes]:
        """The documents that are not empty, always in the same order."""
        return filter(None, self.read())

    def key(self) -> str:
        """A fingerprint that costs no reading: the name, and paths, sizes and times of files."""
        return _key(self.name, self.files)


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """`tokens:`: uint16 ids as nanoGPT writes them; without `validation`, one file to split."""

    name: str
    train: Path
    validation: Path | None = None

    def key(self) -> str:
        """A fingerprint that costs no reading."""
        return _key(self.name, filter(None, (self.train, self.validation)))


def open_source(source: str) -> Source | TokenFiles:
    """The documents that `data.source` names.

    Raises:
      UserError: an unknown kind, nothing at the path, or a missing package or data set, at
        once; malformed content while it is read.
    """
    kind, colon, rest = source.partition(":")
    if kind not in _OPENERS:
        near = did_you_mean(kind, _OPENERS)
        raise UserError(f"data.source={source!r} is unknown: use one of {', '.join(_FORMS)}{near}")
    form = next(form for form in _FORMS if form.split(":")[0] == kind)
    if bool(colon) != (":" in form) or (colon and not rest):
        raise UserError(f"data.source={source!r}: write {form}")
    return _OPENERS[kind](source, rest)


def _key(name, files):
    stats = [(str(file.absolute()), file.stat()) for file in files]
    return json.dumps([name, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]])


def _stdlib(name, _):
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _walk(root, ".py", skipped=STDLIB_SKIPPED)
    if not files:
        use = "use data.source=text:PATH with your own text"
        raise UserError(f"this Python keeps no sources at {root}: {use}")
    return Source(name, files, lambda: map(Path.read_bytes, files))


def _text(name, path):
    files = _find(name, path)
    return Source(name, files, lambda: (file.read_bytes() for file in files))


def _jsonl(name, rest):
    path, field = _split_field(rest)
    files = _find(name, path, ".jsonl")

    def read():
        for file in files:
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _field_of_line(line, field, f"{file}, line {number}")

    return Source(name, files, read)


def _field_of_line(line, field, where):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON ({error}); correct or delete that line") from None
    if not isinstance(row, dict) or field not in row:
        keys = list(row) if isinstance(row, dict) else []
        raise UserError(
            f"{where}: no field {field!r} among {', '.join(keys) or 'none'}; name the field with"
            f" the text as jsonl:PATH#FIELD{did_you_mean(field, keys)}"
        )
    try:
        return _as_bytes(row[field])
    except (TypeError, UnicodeEncodeError) as error:
        raise UserError(
            f"{where}: field {field!r} is no text ({error}); correct the line or name another"
            " field as jsonl:PATH#FIELD"
        ) from None


def _parquet(name, rest):
    import pyarrow
    import pyarrow.parquet

    path, column = _split_field(rest)
    files = _find(name, path, ".parquet")

    def opened(file):
        try:
            return pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowException as error:
            raise UserError(f"{file} is no parquet file ({error}): copy it again") from None

    for file in files:
        with opened(file) as table:
            names = table.schema_arrow.names
        if column not in names:
            raise UserError(
                f"{file} has no column {column!r} among {', '.join(names)}; name the column with"
                f" the text as parquet:PATH#COLUMN{did_you_mean(column, names)}"
            )

    def read():
        for file in files:
            with opened(file) as table:
                for batch in table.iter_batches(batch_size=1024, columns=[column]):
                    try:
                        values = batch.column(0).to_pylist()
                    except UnicodeDecodeError as error:
                        raise UserError(
                            f"{file}: column {column!r} is not UTF-8 ({error}): write it again"
                        ) from None
                    for value in values:
                        try:
                            yield _as_bytes("" if value is None else value)
                        except TypeError as error:
                            raise UserError(
                                f"{file}: column {column!r} is no text ({error}); name another"
                                " column as parquet:PATH#COLUMN"
                            ) from None

    return Source(name, files, read)


def _tokens(name, path):
    folder = expanded(path)
    if not folder.is_dir():
        (file, *others) = _find(name, path)
        if others:
            raise UserError(f"data.source={name!r} is {1 + len(others)} files: name one")
        return TokenFiles(name, file)
    files = [folder / "train.bin", folder / "val.bin"]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"data.source={name!r}: {file.absolute()} is missing; a folder holds train.bin and"
                " val.bin (uint16), else name one file as tokens:PATH"
            )
    return TokenFiles(name, *files)


def _kjv(name, _):
    spec = importlib.util.find_spec("bible")
    file = spec and spec.origin and Path(spec.origin).parent / "data" / "kjv.jsonl"
    if not (file and file.is_file()):
        raise UserError("data.source='kjv' needs an extra package: pip install qkvjax[kjv]")

    def read():
        with open(file, "rb") as lines:
            verses = map(json.loads, lines)
            for _, chapter in itertools.groupby(verses, lambda v: (v["book"], v["chapter"])):
                yield "\n".join(verse["text"] for verse in chapter).encode()

    return Source(name, (file,), read)


def _tfds(name, rest):
    path, split = _split_field(rest, default="train")
    files, read = tfds_source.open_prepared(path, split)
    return Source(name, files, read)


# What a user writes, and who opens it.
_FORMS = (
    "stdlib", "text:PATH", "jsonl:PATH#FIELD", "parquet:PATH#COLUMN", "tokens:PATH", "kjv",
    "tfds:NAME",
)  # fmt: skip
_OPENERS = {
    "stdlib": _stdlib, "text": _text, "jsonl": _jsonl, "parquet": _parquet, "tokens": _tokens,
    "kjv": _kjv, "tfds": _tfds,
}  # fmt: skip


def _as_bytes(value):
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise TypeError(f"it is {type(value).__name__}")
    return value.encode()


def _split_field(rest, default="text"):
    path, _, field = rest.partition("#")
    return path, field or default


def expanded(path: str) -> Path:
    """The path with its ~ or ~user replaced.

    Raises:
      UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}; write the folder in full") from None


def _find(name, path, suffix="") -> tuple[Path, ...]:
    """A file, the files of a folder or the matches of a glob, sorted by relative path."""
    place = expanded(path)
    if place.is_file():
        return (place,)
    if place.is_dir():
        files = _walk(place, suffix)
        if not files:
            what = f"{suffix} file" if suffix else "file"
            raise UserError(f"data.source={name!r}: {place.absolute()} holds no {what}")
        return files
    matches = (Path(match) for match in sorted(glob.glob(str(place), recursive=True)))
    files = tuple(match for match in matches if match.is_file())
    if not files:
        raise UserError(
            f"data.source={name!r}: nothing is at {place.absolute()}: check the path, which is"
            " relative to the current folder"
        )
    return files


def _walk(root, suffix, skipped=frozenset()):
    """Files below a folder that are regular, end in `suffix` and are not hidden."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        shown = [name for name in names if name.endswith(suffix) and not name.startswith(".")]
        found += [Path(folder, name) for name in shown]
    files = filter(Path.is_file, found)
    return tuple(sorted(files, key=lambda file: file.relative_to(root).as_posix()))
