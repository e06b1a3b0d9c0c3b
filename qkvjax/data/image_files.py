"""Reads labelled images: scikit-learn's digits, npz files and the four files of MNIST's format."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qkvjax.data.compression import first_bytes
from qkvjax.data.files import expanded
from qkvjax.data.formats import HEAD, identify
from qkvjax.data.split import HELD_OUT
from qkvjax.errors import UserError

Arrays = tuple[np.ndarray, np.ndarray]  # images and labels, as they are in the files
Splits = tuple[Arrays, Arrays]  # train and validation

# Names of the arrays in an npz file: with four there are two splits.
_NAMES = (("x_train", "y_train", "x_test", "y_test"), ("images", "labels"), ("x", "y"))
_DAMAGE = (OSError, EOFError, ValueError, TypeError, IndexError, zlib.error, zipfile.BadZipFile)


def read_digits() -> Splits:
    """Reads scikit-learn's digits, 1,797 images of 8 x 8 pixels.

    Raises:
      UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "data.source='digits' needs scikit-learn: pip install 'qkvjax[vision]'"
        ) from None
    digits = load_digits()
    return _divided("digits", digits.images.astype(np.float32), digits.target)


def read_npz(source: str, path: str) -> Splits:
    """Reads the arrays of an npz file that have the names of images and labels.

    Raises:
      UserError: nothing is there, a damaged file, or no such arrays.
    """
    file = expanded(path)
    arrays = _read_file(source, file, _load_npz)
    for names in _NAMES:
        if not all(name in arrays for name in names):
            continue
        if len(names) == 2:
            images, labels = (arrays[name] for name in names)
            return _divided(source, images, labels)
        x_train, y_train, x_test, y_test = (arrays[name] for name in names)
        return (x_train, y_train), (x_test, y_test)
    choices = " or ".join(", ".join(names) for names in _NAMES)
    raise UserError(f"{file} holds {', '.join(arrays) or 'nothing'}: save it with {choices}")


def read_idx(source: str, path: str) -> Splits:
    """Reads the four files of MNIST's format, compressed with gzip or not.

    Raises:
      UserError: one of them is missing or damaged.
    """
    folder = expanded(path)

    def read(name: str) -> np.ndarray:
        return _read_file(source, _find_idx(source, folder, name), _load_idx)

    train = (read("train-images-idx3-ubyte"), read("train-labels-idx1-ubyte"))
    test = (read("t10k-images-idx3-ubyte"), read("t10k-labels-idx1-ubyte"))
    return train, test


def require_pairs(source: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raises UserError unless the shapes are those of images and their labels."""
    same_length = images.ndim > 0 and labels.ndim > 0 and len(images) == len(labels)
    if same_length and images.ndim in (3, 4) and labels.ndim == 1 and len(images):
        return
    remedy = ""
    if same_length and labels.ndim == 2:
        is_one_hot = labels.shape[1] > 1
        remedy = "; save labels.argmax(1)" if is_one_hot else "; save labels[:, 0]"
    elif same_length and images.ndim == 2:
        remedy = "; save images.reshape(n, height, width)"
    raise UserError(
        f"{source}: images {images.shape} and labels {labels.shape} do not fit: they are"
        f" [n, height, width] or [n, height, width, channels], and [n]{remedy}"
    )


def _divided(source: str, images: np.ndarray, labels: np.ndarray) -> Splits:
    """Divides images without splits; validation is the last tenth of a fixed shuffle."""
    require_pairs(source, images, labels)
    order = np.random.default_rng(0).permutation(len(images))
    cut = len(order) * (HELD_OUT - 1) // HELD_OUT
    train = order[:cut]
    validation = order[cut:]
    return (images[train], labels[train]), (images[validation], labels[validation])


def _load_npz(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _find_idx(source: str, folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise UserError(
        f"data.source={source!r}: {folder.absolute()} has no {name} (or {name}.gz): name the"
        " folder with the four files of MNIST's format"
    )


def _load_idx(file: Path) -> np.ndarray:
    """Reads an array in MNIST's format.

    The bytes are 0, 0, 8 (for uint8), the number of dimensions; their sizes, four bytes each; the
    numbers.
    """
    open_file = gzip.open if file.suffix == ".gz" else open
    with open_file(file, "rb") as stream:
        content = stream.read()
    if content[:3] != b"\0\0\x08":
        raise ValueError("it does not start as an IDX file of bytes does")
    header_bytes = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:header_bytes], ">u4").astype(int)
    return np.frombuffer(content[header_bytes:], np.uint8).reshape(shape)


def _read_file(source: str, file: Path, read: Callable[[Path], object]):
    """Returns read(file).

    Raises:
      UserError: there is no such file, or `read` fails.
    """
    try:
        return read(file)
    except FileNotFoundError:
        raise UserError(
            f"data.source={source!r}: nothing is at {file.absolute()}: check the path"
        ) from None
    except _DAMAGE as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> UserError:
    """Returns the error about a file that is damaged, or of another format."""
    problem = f"{file} is damaged or of another kind ({error})"
    if "Object arrays" in str(error):
        return UserError(
            f"{problem}: it holds Python objects, which can run code when they are opened; save"
            " images of one size and labels as plain arrays of numbers"
        )
    form = identify(first_bytes(file, HEAD))
    if file.suffix == ".npz" and form.name.startswith("a numpy array"):
        return UserError(f"{problem}: it is one array; save images and labels with numpy.savez")
    # An npz file is a zip archive, and an IDX file may be compressed.
    is_expected = form.name.startswith(("compressed", "a zip"))
    if form.evidence == "magic" and not is_expected:
        return UserError(f"{problem}: it is {form.name}")
    return UserError(f"{problem}: copy it again")
