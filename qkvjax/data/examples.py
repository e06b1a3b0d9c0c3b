"""Labelled examples in memory (symbols, images or sets), read as batches by (seed, step)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from qkvjax.data.order import batch_rows, scored_rows, training_rows
from qkvjax.data.split import check_split


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """Examples of one split.

    Attributes:
      inputs: [n, ...], as they are stored.
      targets: int [n, labels].
      weights: [n, labels], 1 for labels that count and 0 for others; None: all count.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None = None

    def __len__(self):
        return len(self.inputs)

    @property
    def num_labels(self) -> int:
        """Number of labels that count."""
        return int(self.targets.size if self.weights is None else self.weights.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A training and a validation split of labelled examples, a `DatasetLike`.

    Attributes:
      name: as in the configuration.
      train, validation: the splits.
      seq_len: T, tokens that the model sees of an example.
      num_inputs: number of symbols, or the width of the input vectors.
      num_outputs: classes; 1 if the model chooses one of the tokens.
      output: "tokens", "sequence" or "choice", see `qkvjax.models.spec.OUTPUTS`.
      show: maps stored inputs [B, ...] to what the model reads, int32 [B, T] or float32
        [B, tokens, V]; it augments them if it gets a random generator.
      causal: whether the label of a token follows from that token and earlier ones, so that a
        causal model can learn it.
    """

    name: str
    train: Labelled
    validation: Labelled
    seq_len: int
    num_inputs: int
    num_outputs: int
    output: str
    show: Callable[[np.ndarray, np.random.Generator | None], np.ndarray] = lambda x, _: x
    causal: bool = False
    tokenizer = None  # examples are not text

    @functools.cached_property
    def digest(self) -> str:
        """sha256, hexadecimal, over every number and shape; paths do not enter."""
        digest = hashlib.sha256(repr((self.seq_len, self.num_inputs, self.output)).encode())
        for split in (self.train, self.validation):
            for array in (split.inputs, split.targets, split.weights):
                if array is not None:
                    digest.update(f"{array.dtype}{array.shape}".encode())
                    digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    @property
    def description(self) -> str:
        """One line for the log."""
        num_classes = self.seq_len if self.output == "choice" else self.num_outputs
        return (
            f"{self.name}, {len(self.train):,} examples to train on and {len(self.validation):,}"
            f" to score, {self.seq_len} tokens each, {num_classes} classes, sha256"
            f" {self.digest[:12]}"
        )

    @property
    def num_documents(self) -> int:
        """Number of examples of both splits."""
        return len(self.train) + len(self.validation)

    @property
    def num_train_tokens(self) -> int:
        """Number of labels of one epoch."""
        return self.train.num_labels

    @property
    def num_validation_tokens(self) -> int:
        """Number of labels that `scored_batches` scores."""
        return self.validation.num_labels

    def batch(
        self,
        seed: int,
        step: int,
        batch_size: int,
        accumulation: int = 1,
        part: slice = slice(None),
    ) -> dict[str, np.ndarray]:
        """Returns the batch of a step, a pure function of the arguments.

        Args:
          part: which rows of each micro-batch to return. All rows are computed, because one
            random generator augments the whole batch.

        Returns:
          inputs: int32 [A, batch_size / A, T] or float32 [A, batch_size / A, tokens, V] with
          A = accumulation; positions: int32 [A, batch_size / A, T]; targets and weights: int32
          and float32 [A, batch_size / A, labels].

        Raises:
          UserError: accumulation does not divide batch_size.
        """
        numbers = batch_rows(step, batch_size, accumulation, slice(None))
        rows = training_rows(numbers, len(self.train), seed)
        arrays = self._read(self.train, rows, np.random.default_rng([seed, step]))
        shape = (accumulation, batch_size // accumulation)
        return {
            name: array.reshape(*shape, *array.shape[1:])[:, part] for name, array in arrays.items()
        }

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the number of whole batches in one epoch, at least 1."""
        return max(1, len(self.train) // batch_size)

    def scored_batches(
        self, batch_size: int, max_labels: int | None = None, split: str = "validation"
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches that are scored; nothing is augmented.

        Args:
          batch_size: examples of a batch; examples of weight 0 fill up the last batch.
          max_labels: score about this many labels, from examples spaced evenly; None scores all.
          split: "validation" or "train".

        Yields:
          The arrays of `batch` without its first axis; and items, int32 [batch_size, labels], the
          number of the example that each label belongs to.
        """
        check_split(split)
        labelled = self.train if split == "train" else self.validation
        chosen = scored_rows(len(labelled), labelled.num_labels, max_labels)
        for start in range(0, len(chosen), batch_size):
            rows = chosen[start : start + batch_size]
            # `resize` repeats the examples of a short batch; the repeated ones get weight 0.
            filled = np.resize(rows, batch_size)
            arrays = self._read(labelled, filled, None)
            arrays["weights"][len(rows) :] = 0
            shape = arrays["targets"].shape
            numbers = filled.astype(np.int32)
            arrays["items"] = np.broadcast_to(numbers.reshape(-1, *[1] * (len(shape) - 1)), shape)
            yield arrays

    def num_labels(self, split: str) -> int:
        """Returns the number of labels of a split that count."""
        return (self.train if split == "train" else self.validation).num_labels

    def _read(self, labelled: Labelled, rows, rng) -> dict[str, np.ndarray]:
        """Returns the arrays of a batch, [B, ...]; `rng` is None where nothing is augmented."""
        targets = labelled.targets[rows]
        weights = np.ones(targets.shape, np.float32)
        if labelled.weights is not None:
            weights = labelled.weights[rows] * weights
        return {
            "inputs": self.show(labelled.inputs[rows], rng),
            "targets": targets.astype(np.int32),
            "positions": np.tile(np.arange(self.seq_len, dtype=np.int32), (len(rows), 1)),
            "weights": weights,
        }
