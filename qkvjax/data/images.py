"""Labelled images: `digits`, `npz:PATH`, `idx:FOLDER`, `tfds:NAME`, and sets of them with an odd
one out: `anomaly:` before any of these.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qkvjax.data.image_files import _digits, _idx, _npz, _paired, _tfds
from qkvjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Images:
    """Images [n, height, width, channels] with labels [n], train and validation."""

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]

    @property
    def num_classes(self) -> int:
        """Of the training labels: 0 to the largest."""
        return int(self.train[1].max()) + 1

    def normalised(self, images: np.ndarray) -> np.ndarray:
        """float32, each channel with mean 0 and deviation 1 over the training images."""
        mean, std = self._moments
        return (images.astype(np.float32) - mean) / std

    def __post_init__(self):
        some = self.train[0][:10_000].astype(np.float64)
        std = np.maximum(some.std((0, 1, 2)), 1e-6).astype(np.float32)
        object.__setattr__(self, "_moments", (some.mean((0, 1, 2)).astype(np.float32), std))


def open_images(source: str) -> Images:
    """The images that a source names.

    Raises:
      UserError: nothing there, a damaged file, shapes or labels that do not fit.
    """
    kind, _, rest = source.partition(":")
    images = {"digits": _digits, "npz": _npz, "idx": _idx, "tfds": _tfds}[kind](source, rest)
    return Images(*(_checked(source, *split, *images[0]) for split in images))


def _checked(source, images, labels, train_images, train_labels):
    """Images with a channel axis, and int64 labels of classes that the training images have."""
    _paired(source, images, labels)
    _require_numbered(source, train_labels)
    if images.shape[1:] != train_images.shape[1:]:
        raise UserError(
            f"{source}: images to score are {images.shape[1:]}, those to train on"
            f" {train_images.shape[1:]}: make them of one size"
        )
    _require_channels_last(source, images)
    _require_numbered(source, labels)
    if images.dtype.kind not in "buif" or not np.isfinite(images).all():
        raise UserError(f"{source}: pixels ({images.dtype}) must be finite real numbers")
    images = images[..., None] if images.ndim == 3 else images
    known = np.unique(train_labels)
    strange = np.setdiff1d(labels, known) if known[0] >= 0 else known
    if known[-1] >= len(train_labels):  # a head of so many classes would be mostly idle
        strange = known[-1:]
    if not np.issubdtype(labels.dtype, np.integer) or len(strange):
        raise UserError(
            f"{source}: the label {(*strange, labels[0])[0]} is out of range: labels are whole"
            " numbers from 0 on, fewer than there are training images, and those to score are"
            f" among the training images' ({known[0]} to {known[-1]})"
        )
    return images, labels.astype(np.int64)


def _require_numbered(source, labels):
    """Raises UserError for labels that are names and not numbers."""
    if labels.dtype.kind in "USOV":
        raise UserError(
            f"{source}: the labels are names ({labels.dtype}, the first {str(labels[0])!r}), and"
            " must be whole numbers from 0 on: number them, the same way in every split:"
            " names, labels = numpy.unique(labels, return_inverse=True)"
        )


def _require_channels_last(source, images):
    """Raises UserError for [n, channels, height, width], which PyTorch uses."""
    if images.ndim == 4 and images.shape[1] in (1, 3, 4) and images.shape[3] > 4:
        raise UserError(
            f"{source}: images {images.shape} look like [n, channels, height, width], and must be"
            " [n, height, width, channels]: save images.transpose(0, 2, 3, 1)"
        )
