"""Images as examples: patches for a ViT, and sets with an odd one out for an encoder."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from qkvjax.data.examples import Examples, Labelled
from qkvjax.data.images import Images
from qkvjax.errors import UserError

SET_SIZE = 10  # images of a set, one of them of another class


def patches_of(
    source: str, images: Images, patch_size: int, seq_len: int, augment: str
) -> Examples:
    """Images as patches for a ViT: row by row, each [patch_size^2 * channels], normalised.

    Args:
      seq_len: T that the configuration expects: patches and a class token.
      augment: "crop_flip" pads training images by an eighth of their side, cuts them out anywhere
        and mirrors every other one (He et al. 2016, section 4.2); "none" leaves them.

    Raises:
      UserError: a patch size that does not divide the image, or another seq_len.
    """
    _, height, width, channels = images.train[0].shape
    down, across = height // patch_size, width // patch_size
    if height % patch_size or width % patch_size:
        common = np.gcd(height, width)
        remedy = f"choose a divisor of {common}"
        if common == 1:
            remedy = "only 1 divides both sides, so pad or crop the images, to a square for example"
        raise UserError(
            f"model.patch_size={patch_size} does not divide images of {height} x {width} pixels:"
            f" {remedy}"
        )
    if seq_len != down * across + 1:
        raise UserError(
            f"{source} has images of {height} x {width} pixels: {down * across} patches of"
            f" {patch_size} and a class token make data.seq_len={down * across + 1}, not {seq_len}"
        )

    def show(raw, rng):
        if augment == "crop_flip" and rng is not None:
            raw = _crop_flip(raw, rng)
        tiles = images.normalised(raw).reshape(-1, down, patch_size, across, patch_size, channels)
        return tiles.swapaxes(2, 3).reshape(len(raw), down * across, -1)

    train, validation = (Labelled(x, y[:, None]) for x, y in (images.train, images.validation))
    numbers, classes = patch_size**2 * channels, images.num_classes
    return Examples(source, train, validation, seq_len, numbers, classes, "sequence", show)


def sets_of(source: str, images: Images, seq_len: int, sets=(10_000, 2_000)) -> Examples:
    """Sets of ten images, nine of one class and one of another at a random place; the label is
    that place (Kayyam et al. 2026, section 4.2; Zaheer et al. 2017). Vectors are the pixels, where
    the paper has features of a ResNet.

    Raises:
      UserError: another seq_len than the size of a set, or fewer than two classes.
    """
    if seq_len != SET_SIZE:
        raise UserError(f"{source} has sets of {SET_SIZE} images: set data.seq_len={SET_SIZE}")
    splits = []
    for number, (_, labels) in enumerate((images.train, images.validation)):
        rng = np.random.default_rng(number)
        by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        if len(by_class) < 2:
            raise UserError(f"{source}: an odd one out needs images of two classes")
        rows = np.empty((sets[number], SET_SIZE), np.int64)
        place = rng.integers(0, SET_SIZE, len(rows))
        for i, row in enumerate(rows):
            usual, odd = rng.choice(len(by_class), 2, replace=False)
            row[:] = rng.choice(by_class[usual], SET_SIZE)
            row[place[i]] = rng.choice(by_class[odd])
        splits.append(Labelled(rows, place[:, None]))
    kept = [images.normalised(x).reshape(len(x), -1) for x, _ in (images.train, images.validation)]
    flat = np.concatenate(kept)  # a set keeps the numbers of its images
    splits[1] = dataclasses.replace(splits[1], inputs=splits[1].inputs + len(kept[0]))
    content = hashlib.sha256(np.ascontiguousarray(flat)).hexdigest()[:12]
    return Examples(
        f"{source} ({content})",
        *splits,
        seq_len,
        flat.shape[1],
        1,
        "choice",
        lambda rows, _: flat[rows],
    )


def _crop_flip(images, rng):
    count, height, width, _ = images.shape
    margin = height // 8
    room = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    top, left = rng.integers(0, 2 * margin + 1, (2, count))
    rows = (top[:, None] + np.arange(height))[:, :, None]
    columns = (left[:, None] + np.arange(width))[:, None, :]
    cut = room[np.arange(count)[:, None, None], rows, columns]
    mirrored = rng.random(count) < 0.5
    cut[mirrored] = cut[mirrored, :, ::-1]
    return cut
