"""Reads labelled images: scikit-learn's digits, npz files, MNIST's format and TFDS."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qkvjax.data import tfds_source
from qkvjax.data.compression import first_bytes
from qkvjax.data.files import expanded
from qkvjax.data.formats import HEAD, identify
from qkvjax.data.split import HELD_OUT
from qkvjax.errors import UserError


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
