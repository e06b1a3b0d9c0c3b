"""Makes a prepared copy of documents: one pass over the corpus, one over its tokens.

The first pass reads, hashes and tokenises the corpus into parts (`qkvjax.data.parts`). Which
documents are held out is known only at the end of this pass, so a second pass packs the rows of
each split from the parts, which are then deleted. If a process is stopped, the next one resumes
either pass.

Memory: some batches of a few megabytes, the largest document, and eight bytes for each document.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from qkvjax.data.corpus import Corpus
from qkvjax.data.encoding import UnencodablePiece, encode_batches
from qkvjax.data.packing import packed_rows, window_rows
from qkvjax.data.parts import Parts
from qkvjax.data.sources import Source
from qkvjax.data.split import SPLITS, Divider, Split
from qkvjax.data.tokenizers import Tokenizer
from qkvjax.data.unencodable import Unencodable
from qkvjax.errors import UserError
from qkvjax.progress import Progress

_BATCH_BYTES = 4 << 20  # of text; one process tokenises a batch at a time
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a corpus is prepared.

    Attributes:
      seq_len: T.
      score_pads: one document a row, padded.
      whole: all documents are validation.
    """

    seq_len: int
    score_pads: bool
    whole: bool

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are made."""
        return ("validation",) if self.whole else SPLITS

    def packed(self, split: str) -> bool:
        """Returns whether the rows of a split are cut from one stream."""
        return split == "train" and not self.score_pads


def make_copy(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    settings: Settings,
    log: Callable[[str], None],
    alive: Callable[[], None],
) -> None:
    """Fills `folder` with packed rows and summary.json, resuming what an earlier call left there.

    Raises:
      UserError: see the sources and tokenizers; a split without a row.
    """
    summary_path = folder / "summary.json"
    work = folder / "work"
    if not summary_path.is_file():
        if not work.is_dir():
            _delete_content(folder)  # nothing says which corpus it belongs to
            work.mkdir()
        dtype = np.uint16 if tokenizer.num_ids <= 2**16 else np.int32
        parts = Parts(work, dtype, tokenizer.separator)
        try:
            split = _tokenise(source, tokenizer, parts, settings.whole, log, alive)
        finally:
            if not len(parts):  # stopped before there was anything to keep
                shutil.rmtree(work)
        corpus = Corpus(parts, split, tokenizer)
        counts = _pack(folder, source.name, corpus, tokenizer, parts.dtype, settings, log, alive)
        summary = {
            "content": split.digest,
            "num_documents": split.num_documents,
            "num_bytes": split.num_bytes,
            "num_duplicates": split.num_duplicates,
            "moved": split.moved,
            "sizes": {name: corpus.sizes(name) for name in settings.splits},
            "counts": counts,
            "skipped": ", ".join(source.skipped),
        }
        unfinished = folder / "summary.partial"
        unfinished.write_text(json.dumps(summary))
        unfinished.rename(summary_path)
    shutil.rmtree(work, ignore_errors=True)


def _delete_content(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _tokenise(
    source: Source,
    tokenizer: Tokenizer,
    parts: Parts,
    whole: bool,
    log: Callable[[str], None],
    alive: Callable[[], None],
) -> Split:
    """Reads the corpus once, adds what is missing to `parts`, and divides the documents."""
    key = source.key()
    divider = Divider()
    documents = source.documents()
    total, is_limit = _total_bytes(source)
    with Progress(
        "data: tokenising", (total or 0) / 1e6, "MB", log=log, alive=alive, at_most=is_limit
    ) as progress:
        if len(parts):
            log(f"data: going on after {len(parts)} parts that an earlier start tokenised")
            _skip_tokenised(source, documents, parts, divider, progress)
        batches = _batches(documents, tokenizer, divider, alive)
        try:
            _write_parts(parts, encode_batches(tokenizer, batches, parts.dtype), progress)
        except UnencodablePiece as failure:
            piece = failure.batch.origins[failure.piece]
            error = failure.error
            in_document = Unencodable(error.reason, piece.start + error.position)
            raise in_document.as_user_error(tokenizer.spec, _document_name(source, piece)) from None
    if source.key() != key:
        raise _changed(source)
    return divider.divide(source.name, whole)


def _skip_tokenised(
    source: Source,
    documents: Iterator[bytes],
    parts: Parts,
    divider: Divider,
    progress: Progress,
) -> None:
    """Skips the documents that are in `parts`, after checking that they are the same."""
    for part in parts:
        for row, size in zip(part.digests, part.num_bytes.tolist(), strict=True):
            digest = row.tobytes()
            document = next(documents, None)
            if document is None or hashlib.sha256(document).digest() != digest:
                raise _changed(source)
            divider.add(digest, size)
            progress.add(size / 1e6, skipped=True)


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Which document a piece belongs to, and where it begins in it.

    Attributes:
      number: of the document among those that this process tokenises.
      digest: sha256 of the document.
      size: bytes of the document.
      start: first byte of the piece.
      head: first bytes of the document, for messages.
    """

    number: int
    digest: bytes
    size: int
    start: int
    head: bytes


@dataclasses.dataclass
class _Batch:
    """Pieces of documents, and where each comes from."""

    pieces: list[bytes] = dataclasses.field(default_factory=list)
    origins: list[_Origin] = dataclasses.field(default_factory=list)


def _batches(
    documents: Iterable[bytes],
    tokenizer: Tokenizer,
    divider: Divider,
    alive: Callable[[], None],
) -> Iterator[_Batch]:
    """Yields the pieces of documents in batches of about 4 MB; a larger piece is a batch."""
    batch = _Batch()
    num_bytes = 0
    for number, document in enumerate(documents):
        alive()
        digest = hashlib.sha256(document).digest()
        divider.add(digest, len(document))
        start = 0
        for piece in tokenizer.pieces(document):
            batch.pieces.append(piece)
            batch.origins.append(_Origin(number, digest, len(document), start, document[:40]))
            start += len(piece)
            num_bytes += len(piece)
            if num_bytes >= _BATCH_BYTES:
                yield batch
                batch = _Batch()
                num_bytes = 0
    if batch.pieces:
        yield batch


def _write_parts(
    parts: Parts, batches: Iterable[tuple[_Batch, list[np.ndarray]]], progress: Progress
) -> None:
    """Writes the ids of batches into parts."""
    for batch, encoded in batches:
        for origin, piece, ids in zip(batch.origins, batch.pieces, encoded, strict=True):
            if origin.start == 0:
                parts.begin_document()
            parts.add(ids)
            if origin.start + len(piece) == origin.size:
                parts.end_document(origin.digest, origin.size)
            progress.add(len(piece) / 1e6)
    parts.finish()


def _total_bytes(source: Source) -> tuple[int | None, bool]:
    """Returns (bytes of the files, whether this is only a limit for the bytes of text).

    The first is None if the size of the files says nothing about the text.
    """
    kind = source.name.partition(":")[0]
    is_compressed = any(file.name.endswith(_COMPRESSED) for file in source.files)
    if kind not in ("text", "stdlib", "jsonl") or is_compressed:
        return None, False
    return sum(file.stat().st_size for file in source.files), kind == "jsonl"


def _document_name(source: Source, origin: _Origin) -> str:
    """Returns how a message calls a document: its file, if it is one."""
    for file in source.files:
        if file.stat().st_size == origin.size:
            if hashlib.sha256(file.read_bytes()).digest() == origin.digest:
                return str(file)
    return f"document {origin.number + 1:,} of {source.name}, which starts with {origin.head!r},"


def _changed(source: Source) -> UserError:
    return UserError(
        f"data.source={source.name!r} changed while it was read: start again when nothing writes"
        " to it"
    )


def _pack(
    folder: Path,
    name: str,
    corpus: Corpus,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    settings: Settings,
    log: Callable[[str], None],
    alive: Callable[[], None],
) -> dict[str, dict[str, int]]:
    """Writes the rows of all splits; returns split -> {"rows", "labels"}."""
    from qkvjax.data import builder  # imports TFDS

    counts = {split: _count_rows(name, corpus, split, settings) for split in settings.splits}
    width = settings.seq_len + 1
    total_bytes = sum(count["rows"] for count in counts.values()) * width * dtype.itemsize
    written = []
    with Progress("data: packing", total_bytes / 1e6, "MB", log=log, alive=alive) as progress:
        for split, count in counts.items():
            if settings.packed(split):
                blocks = packed_rows(corpus.stream(split), settings.seq_len, builder.BLOCK_ROWS)
            else:
                blocks = window_rows(
                    corpus.documents(split),
                    tokenizer.separator,
                    settings.seq_len,
                    builder.BLOCK_ROWS,
                    first_only=settings.score_pads,
                )
            info = builder.write(folder, split, blocks, count["rows"], width, dtype, progress)
            written.append(info)
    builder.write_metadata(folder, written, width, dtype)
    return counts


def _count_rows(name: str, corpus: Corpus, split: str, settings: Settings) -> dict[str, int]:
    """Returns {"rows": their number, "labels": those that count}.

    Raises:
      UserError: there is too little text for a row.
    """
    seq_len = settings.seq_len
    packed = settings.packed(split)
    num_rows, num_tokens = corpus.num_rows(split, seq_len, packed, settings.score_pads)
    check_enough(name, split, num_rows, num_tokens, seq_len, settings.whole)
    every_label_counts = packed or settings.score_pads
    return {"rows": num_rows, "labels": num_rows * seq_len if every_label_counts else num_tokens}


def check_enough(
    source: str, split: str, num_rows: int, num_tokens: int, seq_len: int, whole: bool
) -> None:
    """Raises UserError if a split has too little text for a row."""
    if split == "train" and not num_rows:
        raise UserError(
            f"data.source={source!r} gives the train split {num_tokens:,} tokens, and one row takes"
            f" data.seq_len + 1 = {seq_len + 1}: use more text or a smaller data.seq_len"
        )
    min_tokens = 1 if whole else seq_len
    if split == "validation" and num_tokens < min_tokens:
        raise UserError(
            f"data.source={source!r} leaves the validation split {num_tokens:,} tokens, less than"
            f" one row of data.seq_len = {seq_len}: use more text or a smaller data.seq_len"
        )


def remarks(summary: dict) -> list[str]:
    """Returns lines for the log about properties of a corpus that affect what scores mean."""
    lines = []
    sizes = summary["sizes"]
    if summary["num_duplicates"]:
        lines.append(
            f"{summary['num_duplicates']:,} of {summary['num_documents']:,} documents repeat an"
            " earlier one; all copies of a document are in the same split"
        )
    if "train" not in sizes:
        return lines
    train_bytes, _ = sizes["train"]
    validation_bytes, largest = sizes["validation"]
    if validation_bytes > train_bytes:
        lines.append(
            "warning: validation text is larger than training text"
            f" ({validation_bytes / 1e6:,.2f} MB, {train_bytes / 1e6:,.2f} MB), because a few"
            " documents are large: cut those into several"
        )
    if summary["num_documents"] > 1 and 2 * largest > validation_bytes:
        lines.append(
            f"warning: one document is {largest / validation_bytes:.0%} of the validation text, so"
            " scores say little about others: use more documents, or cut large ones into several"
        )
    return lines
