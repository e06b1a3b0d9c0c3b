"""Files that a source names: a file, a folder or a glob, and #FIELD behind it."""

from __future__ import annotations

import glob
import itertools
import os
from pathlib import Path

from qkvjax.errors import UserError

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".lz4")


def expanded(path: str) -> Path:
    """Returns the path with its ~ or ~user replaced.

    Raises:
      UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}; write the folder in full") from None


def find(name: str, path: str, suffixes: tuple[str, ...] = ("",)) -> tuple[Path, ...]:
    """Finds a file, the files of a folder or the matches of a glob, sorted by relative path.

    Args:
      name: `data.source`, for messages.
      suffixes: ends of the names that count inside a folder, the usual one first; "" takes every
        name.

    Raises:
      UserError: nothing is there.
    """
    place = expanded(path)
    if place.is_file():
        return (place,)
    if place.is_dir():
        files = walk(place, suffixes)
        if not files:
            what = f"{suffixes[0]} file".strip()
            raise UserError(f"data.source={name!r}: {place.absolute()} holds no {what}")
        return files
    files = _matches(place)
    if not files:
        raise UserError(
            f"data.source={name!r}: nothing is at {place.absolute()}: check the path, which is"
            " relative to the current folder"
        )
    return files


def walk(
    root: Path, suffixes: tuple[str, ...], skipped: frozenset[str] = frozenset()
) -> tuple[Path, ...]:
    """Finds files below a folder that are regular, end in a suffix and are not hidden."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        shown = [name for name in names if name.endswith(suffixes) and not name.startswith(".")]
        found += [Path(folder, name) for name in shown]
    files = filter(Path.is_file, found)
    return tuple(sorted(files, key=lambda file: file.relative_to(root).as_posix()))


def split_field(rest: str, default: str) -> tuple[str, str]:
    """Divides PATH#FIELD at the last #, where a # may stand in PATH as well.

    What exists as a whole is a path without a field.

    Returns:
      (path, field), the field being `default` where none is named.
    """
    path, mark, field = rest.rpartition("#")
    if not mark or (_exists(rest) and rest != path + "#"):
        return rest, default
    return path, field or default


def without_copies(files: tuple[Path, ...]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Leaves out a.txt.gz where a.txt stands beside it.

    Returns:
      (files, what was left out and why).
    """
    present = set(files)
    packed = [file for file in files if file.suffix in COMPRESSED_SUFFIXES]
    copies = {file for file in packed if file.with_suffix("") in present}
    kept = tuple(file for file in files if file not in copies)
    return kept, tuple(f"{file.name} (compressed copy of {file.stem})" for file in sorted(copies))


def listed(names: tuple[str, ...], most: int = 3) -> str:
    """Joins a few names with commas and counts the others."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def fixed_folder(pattern: Path) -> Path:
    """Returns the part of a glob in front of its first wildcard."""
    parts = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1])
    return Path(*parts)


def _matches(pattern: Path) -> tuple[Path, ...]:
    matches = (Path(match) for match in sorted(glob.glob(str(pattern), recursive=True)))
    return tuple(match for match in matches if match.is_file())


def _exists(path: str) -> bool:
    place = expanded(path)
    return place.exists() or bool(_matches(place))
