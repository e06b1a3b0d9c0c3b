"""Labelled images: `digits`, `npz:PATH`, `idx:FOLDER`, `tfds:NAME`, and sets of them with an odd
one out: `anomaly:` before any of these.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qkvjax.data import tfds_source
from qkvjax.data.compression import first_bytes
from qkvjax.data.examples import Examples, Labelled
from qkvjax.data.files import expanded
from qkvjax.data.formats import HEAD, identify
from qkvjax.data.split import HELD_OUT
from qkvjax.errors import UserError

SET_SIZE = 10  # images of a set, one of them of another class


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


def _paired(source, images, labels):
    """Raises UserError unless the shapes are those of images and their labels."""
    fits = images.ndim in (3, 4) and labels.ndim == 1 and len(images) == len(labels)
    if not fits or not len(images):
        remedy = ""
        if len(images) == len(labels) and labels.ndim == 2:
            one_hot = labels.shape[1] > 1
            remedy = f"; save labels{'.argmax(1)' if one_hot else '[:, 0]'}"
        elif images.ndim == 2 and len(images) == len(labels):
            remedy = "; save images.reshape(n, height, width)"
        raise UserError(
            f"{source}: images {images.shape} and labels {labels.shape} do not fit: they are"
            f" [n, height, width] or [n, height, width, channels], and [n]{remedy}"
        )


def _divided(source, images, labels):
    """(train, validation) of what has no split of its own: the last tenth of a fixed shuffle."""
    _paired(source, images, labels)
    order = np.random.default_rng(0).permutation(len(images))
    cut = len(order) * (HELD_OUT - 1) // HELD_OUT
    return [(images[part], labels[part]) for part in (order[:cut], order[cut:])]


def _digits(source, _):
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "data.source='digits' needs scikit-learn: pip install 'qkvjax[vision]'"
        ) from None
    found = load_digits()
    return _divided(source, found.images.astype(np.float32), found.target)


_NAMES = (("x_train", "y_train", "x_test", "y_test"), ("images", "labels"), ("x", "y"))


def _npz(source, rest):
    file = expanded(rest)
    arrays = _read_or_tell(source, file, _load_npz)
    for names in _NAMES:
        if all(name in arrays for name in names):
            found = [arrays[name] for name in names]
            return [found[:2], found[2:]] if len(found) == 4 else _divided(source, *found)
    told = " or ".join(", ".join(names) for names in _NAMES)
    raise UserError(f"{file} holds {', '.join(arrays) or 'nothing'}: save it with {told}")


def _load_npz(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as found:
        return {name: found[name] for name in found.files}


def _idx(source, rest):
    folder = expanded(rest)
    return [
        [
            _read_or_tell(source, _there(source, folder, f"{split}-{part}"), _load_idx)
            for part in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]
        for split in ("train", "t10k")
    ]


def _there(source, folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise UserError(
        f"data.source={source!r}: {folder.absolute()} has no {name} (or {name}.gz): name the"
        " folder with the four files of MNIST's format"
    )


def _load_idx(file: Path) -> np.ndarray:
    """An array in MNIST's format: 0, 0, 8 (uint8), dimensions; their sizes; the numbers."""
    content = (gzip.open if file.suffix == ".gz" else open)(file, "rb").read()
    if content[:3] != b"\0\0\x08":
        raise ValueError("it does not start as an IDX file of bytes does")
    ends = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:ends], ">u4").astype(int)
    return np.frombuffer(content[ends:], np.uint8).reshape(shape)


_DAMAGE = (OSError, EOFError, ValueError, TypeError, IndexError, zlib.error, zipfile.BadZipFile)


def _read_or_tell(source, file: Path, read: Callable[[Path], object]):
    try:
        return read(file)
    except FileNotFoundError:
        raise UserError(
            f"data.source={source!r}: nothing is at {file.absolute()}: check the path"
        ) from None
    except _DAMAGE as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> UserError:
    """What is said of a file that is damaged, or of another format."""
    text = f"{file} is damaged or of another kind ({error}): "
    if "Object arrays" in str(error):
        return UserError(
            f"{text}it holds Python objects, which can run code when they are opened; save images"
            " of one size and labels as plain arrays of numbers"
        )
    found = identify(first_bytes(file, HEAD))
    if file.suffix == ".npz" and found.name.startswith("a numpy array"):
        return UserError(f"{text}it is one array; save images and labels with numpy.savez")
    named = found.evidence == "magic" and not found.name.startswith(("compressed", "a zip"))
    return UserError(text + (f"it is {found.name}" if named else "copy it again"))


def _tfds(source, rest):
    return tfds_source.read_images(rest)
