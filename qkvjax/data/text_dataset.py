"""Text as batches: rows of tokens in, the batch of each (seed, step) out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from qkvjax.data.order import batch_rows, scored_rows, training_rows
from qkvjax.data.packing import (
    Window,
    rows_of_windows,
    scored_batch,
    training_batch,
    windows_batch,
)
from qkvjax.data.rows import DocumentRows, Rows
from qkvjax.data.split import check_split
from qkvjax.data.tokenizers import Tokenizer

_READ_ROWS = 64  # windows that are read at a time for scoring


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Training and validation rows of T = `seq_len` labels, a `DatasetLike`.

    Attributes:
      score_pads: one document a row, and padding is scored.
      digest: sha256, hexadecimal, over the documents' content, the tokenizer, seq_len and the
        flags; paths and times do not enter.
      description: one line for the log.
      num_documents: of both splits.
      num_train_tokens: labels of one epoch.
      num_validation_tokens: labels that `scored_batches` scores.
      train: the rows to train on; () for data that were prepared with `whole`.
      validation: the rows to score.
    """

    tokenizer: Tokenizer
    seq_len: int
    score_pads: bool
    digest: str
    description: str
    num_documents: int
    num_train_tokens: int
    num_validation_tokens: int
    train: Rows | tuple[()]
    validation: DocumentRows
    num_outputs = None  # the classes of a language model are its ids
    output = "tokens"

    @property
    def num_inputs(self) -> int:
        """Number of ids of the tokenizer."""
        return self.tokenizer.num_ids

    def batch(
        self,
        seed: int,
        step: int,
        batch_size: int,
        accumulation: int = 1,
        part: slice = slice(None),
    ) -> dict[str, np.ndarray]:
        """Returns the batch of a step, a pure function of the arguments.

        Row j is number step * batch_size + j of an endless stream, which visits all training rows
        in each epoch, in an order that follows from (seed, epoch).

        Args:
          part: which rows of each micro-batch to return; only these are read.

        Returns:
          inputs, targets, positions, segment_ids: int32 [A, batch_size / A, T] with A =
          accumulation; weights: float32 of the same shape. The rows are the same whatever A is.

        Raises:
          UserError: accumulation does not divide batch_size.
          ValueError: the data were prepared with `whole`, so there is nothing to train on.
        """
        if not len(self.train):
            raise ValueError("data that is prepared whole has no training split")
        numbers = batch_rows(step, batch_size, accumulation, part)
        rows = self.train.read(training_rows(numbers, len(self.train), seed))
        batch = training_batch(rows, self.tokenizer.separator, self.score_pads)
        return {
            name: array.reshape(accumulation, -1, self.seq_len) for name, array in batch.items()
        }

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the number of whole batches in one pass over the training rows, at least 1."""
        return max(1, len(self.train) // batch_size)

    def scored_batches(
        self, batch_size: int, max_labels: int | None = None, split: str = "validation"
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches that `qkvjax.evaluation.language.bits_per_byte` scores.

        Args:
          batch_size: rows of a batch; rows of weight 0 fill up the last batch.
          max_labels: score about this many labels, from rows spaced evenly; which rows does not
            depend on batch_size. None scores all.
          split: "validation": windows of documents, several in a row where they fit; or "train":
            the packed rows, whose separators are not scored.

        Yields:
          The arrays of `batch`, each [batch_size, T]; num_bytes, int32 [batch_size, T], bytes of
          each label; items, int32 [batch_size, T], the number of each label's document (for
          "train" and with `data.score_pads`, of its row); pad_labels, int32 [batch_size], number of
          scored labels that are padding (0 without `data.score_pads`).
        """
        check_split(split)
        rows = self.train if split == "train" else self.validation
        chosen = scored_rows(len(rows), self.num_labels(split), max_labels)
        if split == "train" or self.score_pads:
            yield from self._batches_of_rows(rows, chosen, batch_size)
        else:
            yield from self._batches_of_windows(chosen, batch_size)

    def num_labels(self, split: str) -> int:
        """Returns the number of labels of a split that count."""
        return self.num_train_tokens if split == "train" else self.num_validation_tokens

    @functools.cached_property
    def _documents(self) -> np.ndarray:
        """int32 [windows], the number of the document of each validation window."""
        return self.validation.documents(self.tokenizer.separator)

    def _batches_of_rows(
        self, rows: Rows, chosen: np.ndarray, batch_size: int
    ) -> Iterator[dict[str, np.ndarray]]:
        separator = self.tokenizer.separator
        for start in range(0, len(chosen), batch_size):
            numbers = chosen[start : start + batch_size]
            block = rows.read(numbers)
            missing = batch_size - len(block)
            block = np.pad(block, ((0, missing), (0, 0)), constant_values=separator)
            batch = scored_batch(block, separator, self.score_pads, self.tokenizer.num_bytes)
            if missing:
                batch["weights"][-missing:] = 0
                batch["pad_labels"][-missing:] = 0
            items = np.pad(numbers, (0, missing)).astype(np.int32)
            batch["items"] = np.repeat(items[:, None], self.seq_len, axis=1)
            yield batch

    def _batches_of_windows(
        self, chosen: np.ndarray, batch_size: int
    ) -> Iterator[dict[str, np.ndarray]]:
        separator = self.tokenizer.separator
        packed = rows_of_windows(self._read_windows(chosen), separator)
        while batch := list(itertools.islice(packed, batch_size)):
            batch += [[] for _ in range(batch_size - len(batch))]
            yield windows_batch(batch, self.seq_len, separator, self.tokenizer.num_bytes)

    def _read_windows(self, chosen: np.ndarray) -> Iterator[Window]:
        """Yields each chosen validation window with the number of its document."""
        documents = self._documents
        for start in range(0, len(chosen), _READ_ROWS):
            numbers = chosen[start : start + _READ_ROWS]
            for number, window in zip(numbers, self.validation.read(numbers), strict=True):
                yield window, documents[number]
