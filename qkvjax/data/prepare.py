"""From documents to a prepared copy: one pass over the corpus, one over its tokens.

The corpus is read, hashed and tokenised into parts (`qkvjax.data.parts`). Which documents are held
out is known at the end of that pass only, so the rows of each split are then packed from the parts,
which are deleted at last. Both passes go on where a process that was stopped left them.

Memory: some batches of a few megabytes, the largest document, and eight bytes a document.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from qkvjax.data.corpus import Corpus
from qkvjax.data.encoding import UnfitPiece, encoded
from qkvjax.data.packing import packed_rows, window_rows
from qkvjax.data.parts import Parts
from qkvjax.data.sources import Source
from qkvjax.data.split import SPLITS, Divider, Split
from qkvjax.data.tokenizers import Tokenizer
from qkvjax.data.unencodable import Unfit
from qkvjax.errors import UserError
from qkvjax.progress import Progress

_BATCH_BYTES = 4 << 20  # of text, tokenised by one process at a time
_EXACT = ("text", "stdlib")  # sources whose documents are their files


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
        return SPLITS[1:] if self.whole else SPLITS

    def packed(self, split: str) -> bool:
        """Whether the rows of a split are cut from one stream."""
        return split == "train" and not self.score_pads


def make_copy(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    settings: Settings,
    log: Callable[[str], None],
    alive: Callable[[], None],
) -> None:
    """Fills `folder` with packed rows and summary.json, from what an earlier call left in it.

    Raises:
      UserError: see the sources and tokenizers; a split without a row.
    """
    summary = folder / "summary.json"
    work = folder / "work"
    if not summary.is_file():
        if not work.is_dir():
            # Remains of something else: nothing says which corpus they belong to.
            for remains in folder.iterdir():
                shutil.rmtree(remains) if remains.is_dir() else remains.unlink()
            work.mkdir()
        dtype = np.uint16 if tokenizer.num_ids <= 2**16 else np.int32
        parts = Parts(work, dtype, tokenizer.separator)
        try:
            split = _tokenise(source, tokenizer, parts, settings.whole, log, alive)
        finally:
            if not len(parts):  # stopped before there was anything to keep
                shutil.rmtree(work)
        facts = _pack(folder, source.name, tokenizer, parts, split, settings, log, alive)
        facts["skipped"] = ", ".join(source.skipped)
        unfinished = folder / "summary.partial"
        unfinished.write_text(json.dumps(facts))
        unfinished.rename(summary)
    shutil.rmtree(work, ignore_errors=True)


def _tokenise(source, tokenizer, parts, whole, log, alive) -> Split:
    """Reads the corpus once, adds what is missing to `parts`, and divides the documents."""
    key = source.key()
    divider = Divider()
    documents = source.documents()
    total, at_most = _total(source)
    megabytes = (total or 0) / 1e6
    with Progress(
        "data: tokenising", megabytes, "MB", log=log, alive=alive, at_most=at_most
    ) as progress:
        if len(parts):
            log(f"data: going on after {len(parts)} parts that an earlier start tokenised")
        for part in parts:
            for digest, size in zip(part.digests, part.num_bytes.tolist(), strict=True):
                document = next(documents, None)
                if document is None or hashlib.sha256(document).digest() != digest.tobytes():
                    raise _changed(source)
                divider.add(digest.tobytes(), size)
                progress.add(size / 1e6, skipped=True)
        batches = _batches(documents, tokenizer, divider, alive)
        try:
            _fill(parts, encoded(tokenizer, batches, parts.dtype), progress)
        except UnfitPiece as error:
            piece = error.batch.owners[error.piece]
            why = Unfit(error.why.reason, piece.start + error.why.at)
            raise why.refusal(tokenizer.spec, _name(source, piece)) from None
    if source.key() != key:
        raise _changed(source)
    return divider.divide(source.name, whole)


def _fill(parts, batches, progress):
    """Writes the ids of batches into parts."""
    for batch, found in batches:
        for piece, text, ids in zip(batch.owners, batch.pieces, found, strict=True):
            if piece.start == 0:
                parts.begin_document()
            parts.add(ids)
            if piece.start + len(text) == piece.size:
                parts.end_document(piece.digest, piece.size)
            progress.add(len(text) / 1e6)
    parts.finish()


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Which document a piece is of, and where it begins in it."""

    number: int
    digest: bytes
    size: int
    start: int
    head: bytes


@dataclasses.dataclass
class _Batch:
    pieces: list[bytes]
    owners: list[_Piece]


def _batches(documents, tokenizer, divider, alive) -> Iterator[_Batch]:
    """The pieces of documents in batches of about 4 MB; a larger piece is a batch."""
    batch, size = _Batch([], []), 0
    for number, document in enumerate(documents):
        alive()
        digest = hashlib.sha256(document).digest()
        divider.add(digest, len(document))
        start = 0
        for piece in tokenizer.pieces(document):
            owner = _Piece(number, digest, len(document), start, document[:40])
            batch.pieces.append(piece)
            batch.owners.append(owner)
            start += len(piece)
            size += len(piece)
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = _Batch([], []), 0
    if batch.pieces:
        yield batch


def _total(source) -> tuple[int | None, bool]:
    """(bytes of a source as far as its files tell, whether its text may be less)."""
    kind = source.name.partition(":")[0]
    names = [file.name for file in source.files]
    plain = kind in _EXACT or kind == "jsonl"
    if not plain or any(name.endswith((".gz", ".zst", ".xz", ".bz2")) for name in names):
        return None, False
    return sum(file.stat().st_size for file in source.files), kind == "jsonl"


def _name(source, piece) -> str:
    """A document as a message calls it, by its file if there is one."""
    for file in source.files:
        if file.stat().st_size == piece.size:
            if hashlib.sha256(file.read_bytes()).digest() == piece.digest:
                return str(file)
    return f"document {piece.number + 1:,} of {source.name}, which starts with {piece.head!r},"


def _changed(source):
    return UserError(
        f"data.source={source.name!r} changed while it was read: start again when nothing writes"
        " to it"
    )


def _pack(folder, name, tokenizer, parts, split, settings, log, alive) -> dict:
    """Writes the rows of all splits; returns the content of summary.json."""
    from qkvjax.data import builder  # imports TFDS

    corpus = Corpus(parts, split, tokenizer)
    seq_len = settings.seq_len
    num_rows, counts = {}, {}
    for one in settings.splits:
        packed = settings.packed(one)
        rows, tokens = corpus.num_rows(one, seq_len, packed, settings.score_pads)
        check_enough(name, one, rows, tokens, seq_len, settings.whole)
        num_rows[one] = rows
        labels = rows * seq_len if packed or settings.score_pads else tokens
        counts[one] = {"rows": rows, "labels": labels}
    width = seq_len + 1
    total = sum(num_rows.values()) * width * parts.dtype.itemsize
    written = []
    with Progress("data: packing", total / 1e6, "MB", log=log, alive=alive) as progress:
        for one in settings.splits:
            if settings.packed(one):
                blocks = packed_rows(corpus.stream(one), seq_len, builder.BLOCK_ROWS)
            else:
                blocks = window_rows(
                    corpus.documents(one),
                    tokenizer.separator,
                    seq_len,
                    builder.BLOCK_ROWS,
                    first_only=settings.score_pads,
                )
            shape = (num_rows[one], width, parts.dtype)
            written.append(builder.write(folder, one, blocks, *shape, progress))
    builder.write_metadata(folder, written, width, parts.dtype)
    return {
        "content": split.digest,
        "num_documents": split.num_documents,
        "num_bytes": split.num_bytes,
        "num_duplicates": split.num_duplicates,
        "moved": split.moved,
        "sizes": {one: corpus.sizes(one) for one in settings.splits},
        "counts": counts,
    }


def check_enough(source, split, num_rows, num_tokens, seq_len, whole) -> None:
    """Raises UserError where a split has too little text for a row."""
    if split == "train" and not num_rows:
        raise UserError(
            f"data.source={source!r} gives the train split {num_tokens:,} tokens, and one row takes"
            f" data.seq_len + 1 = {seq_len + 1}: use more text or a smaller data.seq_len"
        )
    if split == "validation" and num_tokens < (1 if whole else seq_len):
        raise UserError(
            f"data.source={source!r} leaves the validation split {num_tokens:,} tokens, less than"
            f" one row of data.seq_len = {seq_len}: use more text or a smaller data.seq_len"
        )


def remarks(summary: dict) -> list[str]:
    """Lines about a corpus that its user should know before believing a score."""
    lines = []
    sizes = summary["sizes"]
    if summary["num_duplicates"]:
        lines.append(
            f"{summary['num_duplicates']:,} of {summary['num_documents']:,} documents repeat an"
            " earlier one; all copies of a document are in the same split"
        )
    if "train" not in sizes:
        return lines
    held_out, largest = sizes["validation"]
    if held_out > sizes["train"][0]:
        lines.append(
            f"warning: validation text is larger than training text ({held_out / 1e6:,.2f} MB,"
            f" {sizes['train'][0] / 1e6:,.2f} MB), because few documents are large: cut those into"
            " several"
        )
    if summary["num_documents"] > 1 and 2 * largest > held_out:
        lines.append(
            f"warning: one document is {largest / held_out:.0%} of the validation text, so scores"
            " say little about others: use more documents, or cut large ones into several"
        )
    return lines
