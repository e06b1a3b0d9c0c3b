"""Where documents come from: `data.source`, as bytes in a fixed order.

There is one function for each kind of source. It finds the files and checks the first bytes of
each, so that a missing file or another format is refused before anything is read. The documents are
read later, one by one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qkvjax.data import jsonl, tables, text_files, tfds_source
from qkvjax.data.files import listed, split_field, walk
from qkvjax.data.token_paths import find_tokens
from qkvjax.data.token_shards import open_shard
from qkvjax.errors import UserError, did_you_mean

# Parts of the standard library that hold tests and packages of others.
STDLIB_SKIPPED = frozenset(
    "site-packages dist-packages test tests idlelib lib2to3 turtledemo __pycache__".split()
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents; each call of `documents` reads them again.

    Attributes:
      name: as in the configuration.
      files: the files that are read, in order.
      read: yields the documents, also empty ones, and None for a null.
      left_out: files that are not read, each with the reason.
      skipped: what the last complete reading skipped, as "2 null"; filled by `documents`.
    """

    name: str
    files: tuple[Path, ...]
    read: Callable[[], Iterable[bytes | None]] = dataclasses.field(repr=False)
    left_out: tuple[str, ...] = ()
    skipped: list[str] = dataclasses.field(default_factory=list, compare=False)

    def documents(self) -> Iterator[bytes]:
        """Yields the documents that are not empty, always in the same order."""
        num_empty = 0
        num_nulls = 0
        for document in self.read():
            if document:
                yield document
            elif document is None:
                num_nulls += 1
            else:
                num_empty += 1
        counts = ((num_empty, "empty"), (num_nulls, "null"))
        self.skipped[:] = [f"{count:,} {kind}" for count, kind in counts if count]

    def key(self) -> str:
        """Returns a fingerprint without reading: the name, and paths, sizes and times of files."""
        return _key(self.name, self.files)

    def notes(self) -> tuple[str, ...]:
        """Returns lines for the log, about files that were left out."""
        return _notes(self.name, len(self.files), self.left_out)


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """`tokens:`: files of ids; without `validation`, one stream to divide.

    Attributes:
      train, validation: the first file of each.
      more_train, more_validation: the files after it, in order.
      dtype: the type of the ids, if the user names it.
      left_out: files beside these that are not read.
    """

    name: str
    train: Path
    validation: Path | None = None
    more_train: tuple[Path, ...] = ()
    more_validation: tuple[Path, ...] = ()
    dtype: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def train_files(self) -> tuple[Path, ...]:
        """All files to train on, or to divide."""
        return (self.train, *self.more_train)

    @property
    def validation_files(self) -> tuple[Path, ...]:
        """All files that are held out."""
        return (self.validation, *self.more_validation) if self.validation else ()

    def key(self) -> str:
        """Returns a fingerprint without reading: the name, and paths, sizes and times of files."""
        return _key(self.name, self.train_files + self.validation_files)

    def notes(self) -> tuple[str, ...]:
        """Returns lines for the log, about files that were left out."""
        num_files = len(self.train_files + self.validation_files)
        return _notes(self.name, num_files, self.left_out)


def open_source(source: str) -> Source | TokenFiles:
    """Opens what `data.source` names.

    Raises:
      UserError: an unknown kind, nothing at the path, another format, or a missing package or
        data set, at once; malformed content while it is read.
    """
    kind, colon, rest = source.partition(":")
    if kind not in _OPENERS:
        hint = did_you_mean(kind, _OPENERS)
        raise UserError(f"data.source={source!r} is unknown: use one of {', '.join(_FORMS)}{hint}")
    form = next(form for form in _FORMS if form.split(":")[0] == kind)
    takes_path = ":" in form
    if bool(colon) != takes_path or (colon and not rest):
        raise UserError(f"data.source={source!r}: write {form}")
    return _OPENERS[kind](source, rest)


def _key(name: str, files: tuple[Path, ...]) -> str:
    stats = [(str(file.absolute()), file.stat()) for file in files]
    return json.dumps([name, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]])


def _notes(name: str, num_files: int, left_out: tuple[str, ...]) -> tuple[str, ...]:
    if not left_out:
        return ()
    total = num_files + len(left_out)
    return (f"{name}: {len(left_out):,} of {total:,} files are left out: {listed(left_out, 5)}",)


def _open_stdlib(name: str, _: str) -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = walk(root, (".py",), skipped=STDLIB_SKIPPED)
    if not files:
        raise UserError(
            f"this Python has no sources at {root}: use data.source=text:PATH with your own text"
        )
    return Source(name, files, lambda: map(Path.read_bytes, files))


def _open_text(name: str, path: str) -> Source:
    files, left_out, formats = text_files.open_text(name, path)

    def read():
        return text_files.read_text(files, formats)

    return Source(name, files, read, left_out)


def _open_jsonl(name: str, rest: str) -> Source:
    path, field = split_field(rest, "text")
    files, left_out, formats = jsonl.open_jsonl(name, path)
    return Source(name, files, lambda: jsonl.read_jsonl(files, formats, field), left_out)


def _open_table(name: str, rest: str) -> Source:
    kind = name.partition(":")[0]
    path, column = split_field(rest, "text")
    files = tables.open_tables(name, kind, path, column)
    return Source(name, files, lambda: tables.read_tables(kind, files, column))


def _open_tokens(name: str, rest: str) -> TokenFiles:
    paths, dtype = find_tokens(name, rest)
    for file in paths.train + paths.validation:
        open_shard(file, dtype)  # refuses other formats
    return TokenFiles(
        name,
        train=paths.train[0],
        validation=paths.validation[0] if paths.validation else None,
        more_train=paths.train[1:],
        more_validation=paths.validation[1:],
        dtype=dtype,
        left_out=paths.left_out,
    )


def _open_kjv(name: str, _: str) -> Source:
    spec = importlib.util.find_spec("bible")
    file = spec and spec.origin and Path(spec.origin).parent / "data" / "kjv.jsonl"
    if not (file and file.is_file()):
        raise UserError("data.source='kjv' needs an extra package: pip install qkvjax[kjv]")

    def read():
        """Yields one document for each chapter, a verse a line."""
        with open(file, "rb") as lines:
            verses = map(json.loads, lines)
            for _, chapter in itertools.groupby(verses, lambda v: (v["book"], v["chapter"])):
                yield "\n".join(verse["text"] for verse in chapter).encode()

    return Source(name, (file,), read)


def _open_tfds(name: str, rest: str) -> Source:
    path, _, split = rest.partition("#")
    files, read = tfds_source.open_prepared(path, split or "train")
    return Source(name, files, read)


# How a user writes each kind, and the function that opens it.
_FORMS = (
    "stdlib",
    "text:PATH",
    "jsonl:PATH#FIELD",
    "parquet:PATH#COLUMN",
    "arrow:PATH#COLUMN",
    "tokens:PATH",
    "kjv",
    "tfds:NAME",
)
_OPENERS = {
    "stdlib": _open_stdlib,
    "text": _open_text,
    "jsonl": _open_jsonl,
    "parquet": _open_table,
    "arrow": _open_table,
    "tokens": _open_tokens,
    "kjv": _open_kjv,
    "tfds": _open_tfds,
}
