"""Which files `tokens:PATH` names, and which of them are held out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from qkvjax.data.files import expanded, find, fixed_folder, split_field
from qkvjax.data.token_shards import DTYPES
from qkvjax.errors import UserError, did_you_mean

SUFFIXES = (".bin", ".npy")
_TRAIN = re.compile("train")
_VALIDATION = re.compile("(?<![a-z])e?val")  # not in "retrieval" or "interval"


@dataclasses.dataclass(frozen=True)
class TokenPaths:
    """The files of `tokens:PATH`.

    Attributes:
      train: files to train on; without `validation` one stream, to be divided.
      validation: files to hold out.
      left_out: names of files that are neither, and are not read.
    """

    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    left_out: tuple[str, ...] = ()


def find_tokens(name: str, rest: str) -> tuple[TokenPaths, str | None]:
    """Finds the files of `tokens:PATH` or `tokens:PATH#DTYPE`.

    A folder with train.bin and val.bin is these two files. Otherwise the files are those in .bin
    and .npy of a folder, or the matches of a glob. Files with "val" in their names are held out if
    others have "train" in theirs, and a file of neither kind is then left out. If the name of a
    file does not decide, the names of its folders below PATH do.

    Args:
      name: `data.source`, for messages.
      rest: PATH or PATH#DTYPE.

    Returns:
      (files, dtype or None).

    Raises:
      UserError: nothing is there; a folder with only one of the two kinds; an unknown dtype.
    """
    path, dtype = split_field(rest, "")
    if dtype and dtype not in DTYPES:
        raise UserError(
            f"data.source={name!r}: {dtype!r} is not a type of ids: use one of"
            f" {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}"
        )
    return _find(name, path), dtype or None


def _find(name: str, path: str) -> TokenPaths:
    root = expanded(path)
    if root.is_file():
        return TokenPaths(train=(root,))
    if not root.is_dir():
        files = find(name, path, SUFFIXES)
        train, validation, others = _by_role(files, fixed_folder(root))
        if train and validation:
            return TokenPaths(train, validation, _names(others))
        return TokenPaths(train=files)
    train_file = root / "train.bin"
    validation_file = root / "val.bin"
    if train_file.is_file() and validation_file.is_file():
        return TokenPaths(train=(train_file,), validation=(validation_file,))
    files = _find_in_folder(name, root)
    train, validation, others = _by_role(files, root)
    if train and validation:
        return TokenPaths(train, validation, _names(others))
    if train or validation:
        raise _one_kind_missing(name, root, has_train=bool(train))
    return TokenPaths(train=files)


def _find_in_folder(name: str, folder: Path) -> tuple[Path, ...]:
    try:
        return find(name, str(folder), SUFFIXES)
    except UserError:
        raise UserError(
            f"data.source={name!r}: {folder.absolute() / 'train.bin'} is missing, and there are no"
            f" other files in {' or '.join(SUFFIXES)}: name a folder or files of token ids"
        ) from None


def _by_role(files: tuple[Path, ...], root: Path) -> tuple[tuple[Path, ...], ...]:
    """Returns (files to train on, files to hold out, other files), each in order."""
    roles = {file: _role(file.relative_to(root)) for file in files}
    return tuple(
        tuple(file for file in files if roles[file] == role)
        for role in ("train", "validation", None)
    )


def _role(path: Path) -> str | None:
    """Returns "train" or "validation"; None if no name in the path, or both, say which."""
    for part in reversed(path.parts):
        is_train = bool(_TRAIN.search(part.lower()))
        is_validation = bool(_VALIDATION.search(part.lower()))
        if is_train != is_validation:
            return "train" if is_train else "validation"
    return None


def _names(files: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(file.name for file in files)


def _one_kind_missing(name: str, folder: Path, has_train: bool) -> UserError:
    present = "train" if has_train else "val"
    missing = "val" if has_train else "train"
    return UserError(
        f"data.source={name!r}: {folder.absolute() / f'{missing}.bin'} is missing: a folder has"
        f" train.bin and val.bin, or files with 'train' and others with 'val' in their names; to"
        f" divide those with {present!r}, name them as tokens:PATH or by a glob"
    )
