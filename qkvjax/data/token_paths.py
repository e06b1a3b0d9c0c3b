"""Which files `tokens:PATH` means, and which of them are held out."""

from __future__ import annotations

import re
from pathlib import Path

from qkvjax.data.files import expanded, find, fixed_folder, split_field
from qkvjax.data.token_shards import DTYPES
from qkvjax.errors import UserError, did_you_mean

SUFFIXES = (".bin", ".npy")
_TRAIN = re.compile("train")
_VALIDATION = re.compile("(?<![a-z])e?val")  # not in "retrieval" or "interval"


def find_tokens(
    name: str, rest: str
) -> tuple[tuple[Path, ...], tuple[Path, ...], str | None, tuple[str, ...]]:
    """Finds the files of `tokens:PATH` or `tokens:PATH#DTYPE`.

    A folder with train.bin and val.bin is these two. Of other folders the files in .bin and .npy
    count, of a glob what it matches: names with "val" in them are held out when others have
    "train" in theirs; a file of neither kind beside both is left out. The name of a file decides,
    else those of its folders below PATH.

    Returns:
      (files to train on, files to hold out, dtype or None, what was left out). With no file to
      hold out the first are one stream, to be divided.

    Raises:
      UserError: nothing is there; a folder with only one of the two kinds; an unknown dtype.
    """
    path, dtype = split_field(rest, "")
    if dtype and dtype not in DTYPES:
        raise UserError(
            f"data.source={name!r}: {dtype!r} is no type of ids: use one of"
            f" {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}"
        )
    place = expanded(path)
    if place.is_file():
        return (place,), (), dtype or None, ()
    is_folder = place.is_dir()
    pair = place / "train.bin", place / "val.bin"
    if is_folder and all(file.is_file() for file in pair):
        return (pair[0],), (pair[1],), dtype or None, ()
    root = place if is_folder else fixed_folder(place)
    files = find(name, path, SUFFIXES) if not is_folder else _in_folder(name, place)
    roles = {file: _role(file.relative_to(root)) for file in files}
    train = tuple(file for file in files if roles[file] == "train")
    validation = tuple(file for file in files if roles[file] == "validation")
    if train and validation:
        others = tuple(file.name for file in files if roles[file] is None)
        return train, validation, dtype or None, others
    if is_folder and (train or validation):
        missing, other = ("val", "train") if train else ("train", "val")
        absent = place.absolute() / f"{missing}.bin"
        raise UserError(
            f"data.source={name!r}: {absent} is missing: a folder has train.bin and val.bin, or"
            f" files with 'train' and others with 'val' in their names; to divide those with"
            f" {other!r}, name them as tokens:PATH or by a glob"
        )
    return files, (), dtype or None, ()


def _in_folder(name, folder):
    try:
        return find(name, str(folder), SUFFIXES)
    except UserError:
        raise UserError(
            f"data.source={name!r}: {folder.absolute() / 'train.bin'} is missing, and there are no"
            f" other files in {' or '.join(SUFFIXES)}: name a folder or files of token ids"
        ) from None


def _role(path: Path) -> str | None:
    for part in reversed(path.parts):
        is_train = bool(_TRAIN.search(part.lower()))
        is_validation = bool(_VALIDATION.search(part.lower()))
        if is_train != is_validation:
            return "train" if is_train else "validation"
    return None
