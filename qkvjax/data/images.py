"""Labelled images: `digits`, `npz:PATH`, `idx:FOLDER` and `tfds:NAME`."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from qkvjax.data.image_files import Arrays, read_digits, read_idx, read_npz, require_pairs
from qkvjax.data.tfds_source import read_images
from qkvjax.errors import UserError

_MOMENT_IMAGES = 10_000  # of which mean and deviation are computed


@dataclasses.dataclass(frozen=True)
class Images:
    """Images [n, height, width, channels] with labels [n], train and validation."""

    train: Arrays
    validation: Arrays

    @property
    def num_classes(self) -> int:
        """Number of classes, from the largest training label."""
        return int(self.train[1].max()) + 1

    def normalised(self, images: np.ndarray) -> np.ndarray:
        """Returns float32 images; over the training images each channel has mean 0, deviation 1."""
        mean, std = self._moments
        return (images.astype(np.float32) - mean) / std

    @functools.cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation) of the training images, float32 [channels] each."""
        images = self.train[0][:_MOMENT_IMAGES].astype(np.float64)
        mean = images.mean((0, 1, 2)).astype(np.float32)
        std = np.maximum(images.std((0, 1, 2)), 1e-6).astype(np.float32)
        return mean, std


def open_images(source: str) -> Images:
    """Reads the images that a source names.

    Raises:
      UserError: nothing is there, a damaged file, shapes or labels that do not fit.
    """
    kind, _, rest = source.partition(":")
    if kind == "digits":
        train, validation = read_digits()
    elif kind == "npz":
        train, validation = read_npz(source, rest)
    elif kind == "idx":
        train, validation = read_idx(source, rest)
    else:
        train, validation = read_images(rest)
    return Images(_checked(source, *train, *train), _checked(source, *validation, *train))


def _checked(
    source: str,
    images: np.ndarray,
    labels: np.ndarray,
    train_images: np.ndarray,
    train_labels: np.ndarray,
) -> Arrays:
    """Returns images with a channel axis and int64 labels.

    Raises:
      UserError: shapes or pixels that are not images, or labels that are not classes of the
        training images.
    """
    require_pairs(source, images, labels)
    _refuse_names(source, train_labels)
    if images.shape[1:] != train_images.shape[1:]:
        raise UserError(
            f"{source}: images to score are {images.shape[1:]}, those to train on"
            f" {train_images.shape[1:]}: make them of one size"
        )
    _refuse_channels_first(source, images)
    _refuse_names(source, labels)
    if images.dtype.kind not in "buif" or not np.isfinite(images).all():
        raise UserError(f"{source}: pixels ({images.dtype}) must be finite real numbers")
    _require_classes(source, labels, train_labels)
    if images.ndim == 3:
        images = images[..., None]
    return images, labels.astype(np.int64)


def _require_classes(source: str, labels: np.ndarray, train_labels: np.ndarray) -> None:
    """Raises UserError for labels that are not whole numbers, or not classes to train on."""
    classes = np.unique(train_labels)
    bad_labels = np.setdiff1d(labels, classes)
    if classes[0] < 0:
        bad_labels = classes
    if classes[-1] >= len(train_labels):  # most classes of such a head would never be trained
        bad_labels = classes[-1:]
    if np.issubdtype(labels.dtype, np.integer) and not len(bad_labels):
        return
    example = bad_labels[0] if len(bad_labels) else labels[0]
    raise UserError(
        f"{source}: the label {example} is out of range: labels are whole numbers from 0 on, fewer"
        " than there are training images, and those to score are among the training images'"
        f" ({classes[0]} to {classes[-1]})"
    )


def _refuse_names(source: str, labels: np.ndarray) -> None:
    """Raises UserError for labels that are names instead of numbers."""
    if labels.dtype.kind in "USOV":
        raise UserError(
            f"{source}: the labels are names ({labels.dtype}, the first {str(labels[0])!r}), and"
            " must be whole numbers from 0 on: number them, the same way in every split:"
            " names, labels = numpy.unique(labels, return_inverse=True)"
        )


def _refuse_channels_first(source: str, images: np.ndarray) -> None:
    """Raises UserError for [n, channels, height, width], which PyTorch uses."""
    if images.ndim == 4 and images.shape[1] in (1, 3, 4) and images.shape[3] > 4:
        raise UserError(
            f"{source}: images {images.shape} look like [n, channels, height, width], and must be"
            " [n, height, width, channels]: save images.transpose(0, 2, 3, 1)"
        )
