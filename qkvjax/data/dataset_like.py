"""What training and evaluation need of a data set, whether it holds text or labelled examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from qkvjax.data.tokenizers import Tokenizer


class DatasetLike(Protocol):
    """The common interface of `Dataset` (text) and `Examples` (symbols, images, sets).

    Attributes:
      tokenizer: of text; None where the data are not text.
      seq_len: T, tokens of a sequence that the model reads.
      num_inputs: ids or symbols; of vectors their width.
      num_outputs: classes of labelled examples; None for text, whose classes are its ids.
      output: what is labelled: "tokens", "sequence" or "choice".
      digest: sha256, hexadecimal, over the content and the settings; paths do not enter.
      description: one line for the log.
      num_documents: documents or examples of both splits.
      num_train_tokens: labels of one epoch.
      num_validation_tokens: labels that `scored_batches` scores.
    """

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def seq_len(self) -> int: ...

    @property
    def num_inputs(self) -> int: ...

    @property
    def num_outputs(self) -> int | None: ...

    @property
    def output(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def num_documents(self) -> int: ...

    @property
    def num_train_tokens(self) -> int: ...

    @property
    def num_validation_tokens(self) -> int: ...

    def batch(
        self,
        seed: int,
        step: int,
        batch_size: int,
        accumulation: int = 1,
        part: slice = slice(None),
    ) -> dict[str, np.ndarray]:
        """Returns the batch of a step: arrays [accumulation, batch_size / accumulation, ...]."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the number of whole batches in one epoch, at least 1."""
        ...

    def scored_batches(
        self, batch_size: int, max_labels: int | None = None, split: str = "validation"
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches that are scored: arrays [batch_size, ...]."""
        ...

    def num_labels(self, split: str) -> int:
        """Returns the number of labels of a split that count."""
        ...


def dataset_record(dataset: DatasetLike) -> dict[str, Any]:
    """Returns what a run writes down about its data: description, digest and counts."""
    return {
        "description": dataset.description,
        "digest": dataset.digest,
        "num_documents": dataset.num_documents,
        "num_train_tokens": dataset.num_train_tokens,
        "num_validation_tokens": dataset.num_validation_tokens,
    }
