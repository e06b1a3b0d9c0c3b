"""Where documents come from: `data.source`, as bytes in a fixed order.

One function a kind. It finds the files at once and looks at the first bytes of each, so that what
is missing or of another format is refused before anything is read; the generator it gives reads
them document by document.
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
from qkvjax.data.files import expanded, listed, split_field, walk
from qkvjax.data.token_paths import find_tokens
from qkvjax.data.token_shards import open_shard
from qkvjax.errors import UserError, did_you_mean

__all__ = ["Source", "TokenFiles", "expanded", "open_source"]
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
      read: yields the documents, empty ones too, and None for a null.
      left_out: files that are not read, each with the reason.
      document_per_file: whether `read` yields a document for each of `files`.
      skipped: what the last complete reading skipped, as "2 nulls"; filled by `documents`.
    """

    name: str
    files: tuple[Path, ...]
    read: Callable[[], Iterable[bytes | None]] = dataclasses.field(repr=False)
    left_out: tuple[str, ...] = ()
    document_per_file: bool = False
    skipped: list[str] = dataclasses.field(default_factory=list, compare=False)

    def documents(self) -> Iterator[bytes]:
        """Yields the documents that are not empty, always in the same order."""
        empty = nulls = 0
        for document in self.read():
            if document:
                yield document
            elif document is None:
                nulls += 1
            else:
                empty += 1
        counts = ((empty, "empty"), (nulls, "null"))
        self.skipped[:] = [f"{count:,} {what}" for count, what in counts if count]

    def key(self) -> str:
        """Returns a fingerprint that costs no reading: the name, and paths, sizes and times."""
        return _key(self.name, self.files)

    def notes(self) -> tuple[str, ...]:
        """Returns lines for the log, about files that were left out."""
        return _notes(self.name, len(self.files), self.left_out)

    def file_of(self, document: bytes) -> Path | None:
        """Finds the file that a document, or a part of one, stands in, by reading again."""
        if self.document_per_file:
            for file, content in zip(self.files, self.read()):
                if document in content:
                    return file
        return None


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """`tokens:`: files of ids; without `validation`, one stream to divide.

    Attributes:
      train, validation: the first file of each.
      more_train, more_validation: the files behind it, in order.
      dtype: what the ids are, where it is named.
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
        """Returns a fingerprint that costs no reading."""
        return _key(self.name, self.train_files + self.validation_files)

    def notes(self) -> tuple[str, ...]:
        """Returns lines for the log, about files that were left out."""
        return _notes(self.name, len(self.train_files + self.validation_files), self.left_out)


def open_source(source: str) -> Source | TokenFiles:
    """Opens what `data.source` names.

    Raises:
      UserError: an unknown kind, nothing at the path, another format, or a missing package or
        data set, at once; malformed content while it is read.
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


def _notes(name, num_files, left_out):
    if not left_out:
        return ()
    total = num_files + len(left_out)
    return (f"{name}: {len(left_out):,} of {total:,} files are left out: {listed(left_out, 5)}",)


def _stdlib(name, _):
    root = Path(sysconfig.get_paths()["stdlib"])
    files = walk(root, (".py",), skipped=STDLIB_SKIPPED)
    if not files:
        use = "use data.source=text:PATH with your own text"
        raise UserError(f"this Python keeps no sources at {root}: {use}")
    return Source(name, files, lambda: map(Path.read_bytes, files), document_per_file=True)


def _text(name, path):
    files, left_out, formats = text_files.open_text(name, path)

    def read():
        return text_files.read_text(files, formats)

    return Source(name, files, read, left_out, document_per_file=True)


def _jsonl(name, rest):
    path, field = split_field(rest, "text")
    files, left_out, formats = jsonl.open_jsonl(name, path)
    return Source(name, files, lambda: jsonl.read_jsonl(files, formats, field), left_out)


def _table(name, rest):
    kind = name.partition(":")[0]
    path, column = split_field(rest, "text")
    files = tables.open_tables(name, kind, path, column)
    return Source(name, files, lambda: tables.read_tables(kind, files, column))


def _tokens(name, rest):
    train, validation, dtype, left_out = find_tokens(name, rest)
    for file in train + validation:
        open_shard(file, dtype)
    return TokenFiles(
        name,
        train[0],
        *validation[:1],
        more_train=train[1:],
        more_validation=validation[1:],
        dtype=dtype,
        left_out=left_out,
    )


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
    path, _, split = rest.partition("#")
    files, read = tfds_source.open_prepared(path, split or "train")
    return Source(name, files, read)


# What a user writes, and who opens it.
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
    "stdlib": _stdlib,
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _table,
    "arrow": _table,
    "tokens": _tokens,
    "kjv": _kjv,
    "tfds": _tfds,
}
