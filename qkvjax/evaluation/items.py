"""Scores by item: the loss of a model on each document or example of a test set.

A score is a ratio over items, sum(value) / sum(weight). With scores by item, two models can be
compared on the same items, and the sampling error of the test set can be estimated.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from qkvjax.files import write_bytes


class Items:
    """Sums over the labels of each item, in the order in which labels come.

    The sums are float64 and do not depend on how labels are divided into batches.
    """

    def __init__(self):
        self._values = np.zeros(0)
        self._weights = np.zeros(0, np.int64)
        self._labels = np.zeros(0, np.int64)

    def add(self, items: np.ndarray, values: np.ndarray, weights: np.ndarray) -> None:
        """Adds labels.

        Args:
          items: int [labels], the number of each label's item, at least 0.
          values: [labels], the loss: bits, or 1 for a wrong class.
          weights: int [labels], the denominator: bytes, or 1.
        """
        if not len(items):
            return
        size = int(items.max()) + 1
        if size > len(self._labels):
            # At least doubled, so that many calls copy the arrays a few times only.
            more = max(size, 2 * len(self._labels)) - len(self._labels)
            self._values = np.pad(self._values, (0, more))
            self._weights = np.pad(self._weights, (0, more))
            self._labels = np.pad(self._labels, (0, more))
        np.add.at(self._values, items, values)
        np.add.at(self._weights, items, weights)
        np.add.at(self._labels, items, 1)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns item int64, value float64, weight int64 and num_labels int64, each [items].

        Only items with labels are in them, in the order of their numbers.
        """
        item = np.flatnonzero(self._labels)
        return {
            "item": item,
            "value": self._values[item],
            "weight": self._weights[item],
            "num_labels": self._labels[item],
        }

    def save(self, path: Path) -> None:
        """Writes the arrays to an npz file, completely or not at all.

        Raises:
          UserError: the file cannot be written.
        """
        content = io.BytesIO()
        np.savez_compressed(content, **self.arrays())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getvalue())
