"""Opens the text of a run: prepared by the first call, found again by later ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qkvjax.data.prepare import Settings, check_enough, make_copy, remarks
from qkvjax.data.rows import PackedRows, PreparedRows, Rows, WindowRows
from qkvjax.data.sources import Source, TokenFiles, open_source
from qkvjax.data.store import damaged, find_or_resume
from qkvjax.data.text_dataset import Dataset
from qkvjax.data.token_files import open_tokens
from qkvjax.data.tokenizers import Tokenizer, load_tokenizer
from qkvjax.errors import UserError

_FORMAT = 3  # of a prepared copy; another number prepares it again
_SUMMARY_KEYS = (
    "content",
    "num_documents",
    "num_bytes",
    "num_duplicates",
    "moved",
    "sizes",
    "counts",
    "skipped",
)


def prepare(
    source: str,
    tokenizer: str,
    seq_len: int,
    score_pads: bool = False,
    *,
    whole: bool = False,
    log: Callable[[str], None] = lambda line: None,
    alive: Callable[[], None] = lambda: None,
) -> Dataset:
    """Returns documents as rows of tokens.

    The first call reads, tokenises, divides and packs the documents; later ones find the result.
    That copy is a TFDS data set in the data folder (`qkvjax.data.store`); `tokens:` files are used
    as they are. If a preparation is stopped, the next call resumes it.

    Args:
      source: `data.source`.
      tokenizer: `data.tokenizer`.
      seq_len: T.
      score_pads: one document a row, padded with the separator, every label of weight 1: how
        the paper trained and scored.
      whole: all documents are validation, to score a corpus.
      log: gets a line about the data. During the first call it also gets lines about the progress,
        twice a minute, unless stderr is a terminal and shows a bar.
      alive: called again and again while data are prepared, here or by another process.

    Raises:
      UserError: see the sources and tokenizers; a split without a row.
    """
    opened = open_source(source)
    loaded = load_tokenizer(tokenizer)
    for note in opened.notes():
        log(f"data: {note}")
    settings = Settings(seq_len, score_pads, whole)
    if isinstance(opened, TokenFiles):
        dataset = _from_tokens(opened, loaded, settings, log)
        notes = []
    else:
        dataset, notes = _from_documents(opened, loaded, settings, log, alive)
    log(f"data: {dataset.description}")
    for note in notes:
        log(f"data: {note}")
    return dataset


def whole_rows(dataset: Dataset, count: int) -> np.ndarray:
    """Returns up to `count` validation windows without padding, spaced evenly: int32 [count, T].

    Raises:
      UserError: no validation document is as long as a window.
    """
    rows = dataset.validation
    for rows_per_result in (4, 16, len(rows)):  # reads more rows only if too few are whole
        num_tried = min(len(rows), rows_per_result * count)
        tried = rows.read((np.arange(num_tried) * 2 + 1) * len(rows) // (2 * num_tried))
        whole = tried[(tried[:, 1:] != dataset.tokenizer.separator).all(axis=1)]
        if len(whole) >= count:
            break
    if not len(whole):
        raise UserError(
            f"no validation document has data.seq_len = {dataset.seq_len} tokens: give longer"
            " text with --data"
        )
    count = min(count, len(whole))
    return whole[(np.arange(count) * len(whole)) // count, :-1]


def _from_documents(
    source: Source,
    tokenizer: Tokenizer,
    settings: Settings,
    log: Callable[[str], None],
    alive: Callable[[], None],
) -> tuple[Dataset, list[str]]:
    """Returns (data set, lines about it for the log)."""
    flags = dataclasses.astuple(settings)
    key = _sha256([_FORMAT, source.key(), tokenizer.fingerprint, flags])

    def make(partial: Path, alive: Callable[[], None]) -> None:
        folder = partial.parent
        log(f"data: preparing {source.name} for seq_len={settings.seq_len} in {folder}, once")
        make_copy(partial, source, tokenizer, settings, log, alive)

    kind = source.name.partition(":")[0]
    folder = find_or_resume(f"{kind}-{key[:16]}", make, alive)
    summary = _read_summary(folder)
    counts = summary["counts"]
    content = summary["content"]
    if summary["moved"]:  # the same documents without copies are divided in another way
        content = f"{content} with copies on one side"
    dataset = _make_dataset(
        tokenizer,
        settings,
        content,
        name=source.name,
        num_files=len(source.files),
        num_documents=summary["num_documents"],
        num_bytes=summary["num_bytes"],
        skipped=summary["skipped"],
        rows={split: PreparedRows(folder, split, count["rows"]) for split, count in counts.items()},
        labels={split: count["labels"] for split, count in counts.items()},
    )
    return dataset, remarks(summary)


def _from_tokens(
    source: TokenFiles, tokenizer: Tokenizer, settings: Settings, log: Callable[[str], None]
) -> Dataset:
    seq_len = settings.seq_len
    streams, content = open_tokens(source, tokenizer, settings.whole, log)
    rows: dict[str, Rows] = {}
    labels: dict[str, int] = {}
    for split in settings.splits:
        stream = streams[split]
        if settings.packed(split):
            rows[split] = PackedRows(stream, seq_len)
        else:
            rows[split] = WindowRows(
                stream, seq_len, tokenizer.separator, first_only=settings.score_pads
            )
        num_rows = len(rows[split])
        num_tokens = len(stream.tokens) if split == "train" else stream.num_labels
        check_enough(source.name, split, num_rows, num_tokens, seq_len, settings.whole)
        every_label_counts = settings.packed(split) or settings.score_pads
        labels[split] = num_rows * seq_len if every_label_counts else stream.num_labels
    return _make_dataset(
        tokenizer,
        settings,
        content,
        name=source.name,
        num_files=len(source.train_files + source.validation_files),
        num_documents=sum(len(stream.spans) for stream in streams.values()),
        num_bytes=sum(stream.tokens.nbytes for stream in streams.values()),
        skipped="",
        rows=rows,
        labels=labels,
    )


def _make_dataset(
    tokenizer: Tokenizer,
    settings: Settings,
    content: str,
    *,
    name: str,
    num_files: int,
    num_documents: int,
    num_bytes: int,
    skipped: str,
    rows: dict[str, Rows],
    labels: dict[str, int],
) -> Dataset:
    """Returns a data set with its digest and its description.

    Args:
      content: sha256 of the documents or ids.
      name: `data.source`.
      skipped: documents that were skipped, as "2 null", or "".
      rows: split -> rows, see `qkvjax.data.rows`.
      labels: split -> number of labels that count.
    """
    num_train = labels.get("train", 0)
    num_validation = labels["validation"]
    counts = f"train {num_train:,} tokens, validation {num_validation:,}"
    if settings.whole:
        counts = f"{num_validation:,} tokens to score"
    files = f"{num_files:,} file"
    if num_files != 1:
        files += "s"
    documents = f"{num_documents:,} document"
    if num_documents != 1:
        documents += "s"
    if skipped:
        documents += f" ({skipped} skipped)"
    return Dataset(
        tokenizer=tokenizer,
        seq_len=settings.seq_len,
        score_pads=settings.score_pads,
        digest=_sha256([content, tokenizer.fingerprint, dataclasses.astuple(settings)]),
        description=(
            f"{name}, {files}, {documents}, {num_bytes / 1e6:.2f} MB, sha256 {content[:12]};"
            f" {counts}"
        ),
        num_documents=num_documents,
        num_train_tokens=num_train,
        num_validation_tokens=num_validation,
        train=rows.get("train", ()),
        validation=rows["validation"],
    )


def _read_summary(folder: Path) -> dict:
    """Reads the summary of a prepared copy.

    Raises:
      UserError: it is damaged.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text())
        return {key: summary[key] for key in _SUMMARY_KEYS}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(folder, error) from None


def _sha256(values: list) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
