"""Images as examples: patches for a ViT, and sets with an odd one out for an encoder."""

from __future__ import annotations

import hashlib

import numpy as np

from qkvjax.data.examples import Examples, Labelled
from qkvjax.data.image_files import Arrays
from qkvjax.data.images import Images
from qkvjax.errors import UserError

SET_SIZE = 10  # images of a set, one of which is of another class


def patches_of(
    source: str, images: Images, patch_size: int, seq_len: int, augment: str
) -> Examples:
    """Returns images as patches for a ViT.

    The patches are in order, row by row, each [patch_size^2 * channels], normalised.

    Args:
      seq_len: T that the configuration expects: the patches and a class token.
      augment: "crop_flip" pads training images by an eighth of their side, cuts them out anywhere
        and mirrors half of them (He et al. 2016, section 4.2); "none" leaves them.

    Raises:
      UserError: a patch size that does not divide the image, or another seq_len.
    """
    _, height, width, channels = images.train[0].shape
    if height % patch_size or width % patch_size:
        raise _patch_size_error(patch_size, height, width)
    num_rows = height // patch_size
    num_columns = width // patch_size
    num_patches = num_rows * num_columns
    if seq_len != num_patches + 1:
        raise UserError(
            f"{source} has images of {height} x {width} pixels: {num_patches} patches of"
            f" {patch_size} and a class token make data.seq_len={num_patches + 1}, not {seq_len}"
        )

    def show(raw: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        if augment == "crop_flip" and rng is not None:
            raw = _crop_flip(raw, rng)
        pixels = images.normalised(raw)
        tiles = pixels.reshape(-1, num_rows, patch_size, num_columns, patch_size, channels)
        return tiles.swapaxes(2, 3).reshape(len(raw), num_patches, -1)

    return Examples(
        source,
        train=_labelled(images.train),
        validation=_labelled(images.validation),
        seq_len=seq_len,
        num_inputs=patch_size**2 * channels,
        num_outputs=images.num_classes,
        output="sequence",
        show=show,
    )


def sets_of(
    source: str, images: Images, seq_len: int, sets: tuple[int, int] = (10_000, 2_000)
) -> Examples:
    """Returns sets of ten images: nine of one class, and one of another at a random position.

    The label is that position (Kayyam et al. 2026, section 4.2; Zaheer et al. 2017). The vectors
    are the normalised pixels, where the paper has features of a ResNet.

    Args:
      sets: number of sets to train on, and to score.

    Raises:
      UserError: another seq_len than the size of a set, or fewer than two classes.
    """
    if seq_len != SET_SIZE:
        raise UserError(f"{source} has sets of {SET_SIZE} images: set data.seq_len={SET_SIZE}")
    train_images, train_labels = images.train
    validation_images, validation_labels = images.validation
    train_sets, train_targets = _draw_sets(source, train_labels, sets[0], seed=0)
    validation_sets, validation_targets = _draw_sets(source, validation_labels, sets[1], seed=1)
    # A set stores the numbers of its images, [SET_SIZE] instead of [SET_SIZE, pixels].
    flat = np.concatenate([_flat(images, train_images), _flat(images, validation_images)])
    validation_sets += len(train_images)
    content = hashlib.sha256(np.ascontiguousarray(flat)).hexdigest()[:12]
    return Examples(
        f"{source} ({content})",
        train=Labelled(train_sets, train_targets),
        validation=Labelled(validation_sets, validation_targets),
        seq_len=seq_len,
        num_inputs=flat.shape[1],
        num_outputs=1,
        output="choice",
        show=lambda numbers, _: flat[numbers],
    )


def _labelled(split: Arrays) -> Labelled:
    images, labels = split
    return Labelled(images, labels[:, None])


def _flat(images: Images, split: np.ndarray) -> np.ndarray:
    """Returns normalised images as vectors, [n, pixels]."""
    return images.normalised(split).reshape(len(split), -1)


def _patch_size_error(patch_size: int, height: int, width: int) -> UserError:
    common = np.gcd(height, width)
    remedy = f"choose a divisor of {common}"
    if common == 1:
        remedy = "only 1 divides both sides, so pad or crop the images, to a square for example"
    return UserError(
        f"model.patch_size={patch_size} does not divide images of {height} x {width} pixels:"
        f" {remedy}"
    )


def _draw_sets(
    source: str, labels: np.ndarray, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws sets with an odd one out.

    Returns:
      (numbers of images, int64 [count, SET_SIZE]; position of the odd one, int64 [count, 1]).
    """
    rng = np.random.default_rng(seed)
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if len(by_class) < 2:
        raise UserError(f"{source}: an odd one out needs images of two classes")
    numbers = np.empty((count, SET_SIZE), np.int64)
    odd_position = rng.integers(0, SET_SIZE, count)
    for row, position in zip(numbers, odd_position, strict=True):
        usual_class, odd_class = rng.choice(len(by_class), 2, replace=False)
        row[:] = rng.choice(by_class[usual_class], SET_SIZE)
        row[position] = rng.choice(by_class[odd_class])
    return numbers, odd_position[:, None]


def _crop_flip(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pads images, cuts each out at a random place, and mirrors half of them.

    Args:
      images: [n, height, width, channels].
    """
    count, height, width, _ = images.shape
    margin = height // 8
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    top, left = rng.integers(0, 2 * margin + 1, (2, count))
    rows = (top[:, None] + np.arange(height))[:, :, None]
    columns = (left[:, None] + np.arange(width))[:, None, :]
    crops = padded[np.arange(count)[:, None, None], rows, columns]
    is_mirrored = rng.random(count) < 0.5
    crops[is_mirrored] = crops[is_mirrored, :, ::-1]
    return crops
