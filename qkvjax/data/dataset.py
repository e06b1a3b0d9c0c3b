"""The data of a run: prepared once, then batches as a function of (seed, step)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from qkvjax.data.order import batch_rows, scored_rows, training_rows
from qkvjax.data.packing import rows_of_windows, scored_batch, training_batch, windows_batch
from qkvjax.data.prepare import Settings, check_enough, make_copy, remarks
from qkvjax.data.rows import PackedRows, PreparedRows, WindowRows
from qkvjax.data.sources import Source, TokenFiles, open_source
from qkvjax.data.split import check_split
from qkvjax.data.store import damaged, find_or_resume
from qkvjax.data.token_files import open_tokens
from qkvjax.data.tokenizers import Tokenizer, load_tokenizer
from qkvjax.errors import UserError

_FORMAT = 3  # of a prepared copy; another number prepares anew
READ_ROWS = 64  # windows that are read at a time for scoring
_SUMMARY = (
    "content",
    "num_documents",
    "num_bytes",
    "num_duplicates",
    "moved",
    "sizes",
    "counts",
    "skipped",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Training and validation rows of T = `seq_len` labels.

    Attributes:
      digest: sha256, hexadecimal, over the documents' content, the tokenizer, seq_len and the
        flags; paths and times do not enter.
      description: one line for the log.
      num_documents: of both splits.
      num_train_tokens: labels of one epoch.
      num_validation_tokens: labels that `scored_batches` scores.
      train, validation: the rows, see `qkvjax.data.rows`.
    """

    tokenizer: Tokenizer
    seq_len: int
    score_pads: bool
    digest: str
    description: str
    num_documents: int
    num_train_tokens: int
    num_validation_tokens: int
    train: PreparedRows | PackedRows | WindowRows | tuple
    validation: PreparedRows | WindowRows
    num_outputs = None  # a language model's classes are its ids
    output = "tokens"

    @property
    def num_inputs(self) -> int:
        """Ids of the tokenizer."""
        return self.tokenizer.num_ids

    def batch(
        self,
        seed: int,
        step: int,
        batch_size: int,
        accumulation: int = 1,
        part: slice = slice(None),
    ) -> dict[str, np.ndarray]:
        """The batch of a step, a pure function of the arguments.

        Row j is number step * batch_size + j of an endless stream that visits all training rows
        in each epoch, in an order that follows from (seed, epoch).

        Args:
          part: which rows of each micro-batch to make; only these are read.

        Returns:
          inputs, targets, positions, segment_ids: int32 [A, batch_size / A, T] with A =
          accumulation; weights: float32 of the same shape. The rows are the same whatever A.

        Raises:
          UserError: accumulation does not divide batch_size.
          ValueError: the data was prepared with `whole`, so there is nothing to train on.
        """
        if not len(self.train):
            raise ValueError("data that is prepared whole has no training split")
        numbers = batch_rows(step, batch_size, accumulation, part)
        rows = self.train.read(training_rows(numbers, len(self.train), seed))
        batch = training_batch(rows, self.tokenizer.separator, self.score_pads)
        return {k: v.reshape(accumulation, -1, self.seq_len) for k, v in batch.items()}

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in one pass over the training rows, at least 1."""
        return max(1, len(self.train) // batch_size)

    def scored_batches(
        self, batch_size: int, max_labels: int | None = None, split: str = "validation"
    ) -> Iterator[dict[str, np.ndarray]]:
        """What is scored, as `qkvjax.evaluation.language.bits_per_byte` defines it.

        Args:
          batch_size: rows of a batch; the last one is filled up with rows of weight 0.
          max_labels: about so many labels, from rows spaced evenly; which rows does not depend
            on batch_size. None scores all.
          split: "validation": windows of documents, several in a row where they fit; or "train":
            the packed rows, separators not scored.

        Yields:
          The arrays of `batch`, each [batch_size, T]; num_bytes, int32 [batch_size, T], bytes of
          each label; items, int32 [batch_size, T], the number of the document that each label is of
          (of "train" and with `data.score_pads`, of the row); pad_labels, int32 [batch_size],
          scored labels that are padding (0 without `data.score_pads`).
        """
        check_split(split)
        rows = self.train if split == "train" else self.validation
        chosen = scored_rows(len(rows), self.num_labels(split), max_labels)
        if split == "train" or self.score_pads:
            yield from self._batches_of_rows(rows, chosen, batch_size)
        else:
            yield from self._batches_of_windows(rows, chosen, batch_size)

    def num_labels(self, split: str) -> int:
        """Labels of a split that count."""
        return self.num_train_tokens if split == "train" else self.num_validation_tokens

    @functools.cached_property
    def _documents(self) -> np.ndarray:
        """int32 [windows]: the number of the document of each validation window."""
        return self.validation.documents(self.tokenizer.separator)

    def _batches_of_rows(self, rows, chosen, batch_size):
        separator = self.tokenizer.separator
        for start in range(0, len(chosen), batch_size):
            block = rows.read(chosen[start : start + batch_size])
            missing = batch_size - len(block)
            block = np.pad(block, ((0, missing), (0, 0)), constant_values=separator)
            batch = scored_batch(block, separator, self.score_pads, self.tokenizer.num_bytes)
            if missing:
                batch["weights"][-missing:] = 0
                batch["pad_labels"][-missing:] = 0
            numbers = np.pad(np.asarray(chosen[start : start + batch_size]), (0, missing))
            batch["items"] = np.repeat(numbers.astype(np.int32)[:, None], self.seq_len, axis=1)
            yield batch

    def _batches_of_windows(self, rows, chosen, batch_size):
        separator = self.tokenizer.separator
        blocks = (chosen[i : i + READ_ROWS] for i in range(0, len(chosen), READ_ROWS))
        documents = self._documents
        windows = (
            (window, documents[number])
            for block in blocks
            for number, window in zip(block, rows.read(block))
        )
        packed = rows_of_windows(windows, separator)
        while batch := list(itertools.islice(packed, batch_size)):
            batch += [[] for _ in range(batch_size - len(batch))]
            yield windows_batch(batch, self.seq_len, separator, self.tokenizer.num_bytes)


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
    """Documents as rows of tokens: read, tokenised, divided and packed once, then found again.

    The copy is a TFDS data set in the data folder (`qkvjax.data.store`); `tokens:` files are
    used as they are. A preparation that is stopped goes on at the next call.

    Args:
      source: `data.source`.
      tokenizer: `data.tokenizer`.
      seq_len: T.
      score_pads: one document a row, padded with the separator, every label of weight 1: how
        the paper trained and scored.
      whole: all documents are validation, to score a corpus.
      log: gets a line about the data, and others while they are read the first time: how far that
        is, twice a minute, unless stderr is a terminal and shows a bar.
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
    """Up to `count` validation windows without padding, spaced evenly: int32 [count, T].

    Raises:
      UserError: no validation document is as long as a window.
    """
    rows = dataset.validation
    for per_row in (4, 16, len(rows)):  # looks no further than it has to
        tried = min(len(rows), per_row * count)
        chosen = rows.read((np.arange(tried) * 2 + 1) * len(rows) // (2 * tried))
        whole = chosen[(chosen[:, 1:] != dataset.tokenizer.separator).all(axis=1)]
        if len(whole) >= count:
            break
    if not len(whole):
        raise UserError(
            f"no validation document has data.seq_len = {dataset.seq_len} tokens: give longer"
            " text with --data"
        )
    return whole[(np.arange(min(count, len(whole))) * len(whole)) // min(count, len(whole)), :-1]


def _from_documents(source: Source, tokenizer: Tokenizer, settings: Settings, log, alive):
    """(data set, lines about it)."""
    flags = dataclasses.astuple(settings)
    key = _sha256([_FORMAT, source.key(), tokenizer.fingerprint, flags])

    def make(folder, alive):
        place = folder.parent
        log(f"data: preparing {source.name} for seq_len={settings.seq_len} in {place}, once")
        make_copy(folder, source, tokenizer, settings, log, alive)

    kind = source.name.partition(":")[0]
    folder = find_or_resume(f"{kind}-{key[:16]}", make, alive)
    summary = _read_summary(folder)
    counts = summary["counts"]
    rows = {name: PreparedRows(folder, name, count["rows"]) for name, count in counts.items()}
    labels = {name: count["labels"] for name, count in counts.items()}
    content = summary["content"]
    if summary["moved"]:  # copies of a document made it another division of the same documents
        content = f"{content} with copies on one side"
    dataset = _dataset(
        source.name,
        tokenizer,
        settings,
        content,
        summary["num_documents"],
        summary["num_bytes"],
        rows,
        labels,
        len(source.files),
        summary["skipped"],
    )
    return dataset, remarks(summary)


def _from_tokens(source: TokenFiles, tokenizer: Tokenizer, settings: Settings, log) -> Dataset:
    seq_len, score_pads = settings.seq_len, settings.score_pads
    streams, content = open_tokens(source, tokenizer, settings.whole, log)
    rows, labels = {}, {}
    for name in settings.splits:
        stream = streams[name]
        packed = settings.packed(name)
        windows = WindowRows(stream, seq_len, tokenizer.separator, first_only=score_pads)
        rows[name] = PackedRows(stream, seq_len) if packed else windows
        scored = stream.num_labels
        num_tokens = len(stream.tokens) if name == "train" else scored
        check_enough(source.name, name, len(rows[name]), num_tokens, seq_len, settings.whole)
        labels[name] = len(rows[name]) * seq_len if packed or score_pads else scored
    num_documents = sum(len(stream.spans) for stream in streams.values())
    num_bytes = sum(stream.tokens.nbytes for stream in streams.values())
    return _dataset(
        source.name,
        tokenizer,
        settings,
        content,
        num_documents,
        num_bytes,
        rows,
        labels,
        len(source.train_files + source.validation_files),
    )


def _dataset(
    name,
    tokenizer,
    settings,
    content,
    num_documents,
    num_bytes,
    rows,
    labels,
    num_files,
    skipped="",
) -> Dataset:
    digest = _sha256([content, tokenizer.fingerprint, dataclasses.astuple(settings)])
    counts = f"train {labels.get('train', 0):,} tokens, validation {labels['validation']:,}"
    if settings.whole:
        counts = f"{labels['validation']:,} tokens to score"
    size = f"{num_files:,} file{'s' * (num_files != 1)}, {num_documents:,} document"
    size += "s" * (num_documents != 1)
    size += f" ({skipped} skipped)" * bool(skipped) + f", {num_bytes / 1e6:.2f} MB"
    return Dataset(
        tokenizer=tokenizer,
        seq_len=settings.seq_len,
        score_pads=settings.score_pads,
        digest=digest,
        description=f"{name}, {size}, sha256 {content[:12]}; {counts}",
        num_documents=num_documents,
        num_train_tokens=labels.get("train", 0),
        num_validation_tokens=labels["validation"],
        train=rows.get("train", ()),
        validation=rows["validation"],
    )


def _read_summary(folder: Path):
    try:
        summary = json.loads((folder / "summary.json").read_text())
        return {key: summary[key] for key in _SUMMARY}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(folder, error) from None


def _sha256(values) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
