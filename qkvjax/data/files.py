"""The files that a source names: a file, a folder or a glob, with #FIELD after it."""

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
      suffixes: ends of the file names that count inside a folder, the usual one first; "" counts
        every file.

    Raises:
      UserError: nothing is there.
    """
    root = expanded(path)
    if root.is_file():
        return (root,)
    if root.is_dir():
        files = walk(root, suffixes)
        if not files:
            kind = f"{suffixes[0]} file".strip()
            raise UserError(f"data.source={name!r}: {root.absolute()} holds no {kind}")
        return files
    files = _glob_files(root)
    if not files:
        raise UserError(
            f"data.source={name!r}: nothing is at {root.absolute()}: check the path, which is"
            " relative to the current folder"
        )
    return files


def walk(
    root: Path, suffixes: tuple[str, ...], skipped: frozenset[str] = frozenset()
) -> tuple[Path, ...]:
    """Finds the regular files below a folder that end in a suffix and are not hidden.

    Args:
      skipped: names of folders that are not searched.
    """
    paths = []
    for folder, subfolders, names in os.walk(root):
        # `os.walk` goes on with the folders that this list keeps.
        subfolders[:] = [f for f in subfolders if f not in skipped and not f.startswith(".")]
        paths += [
            Path(folder, name)
            for name in names
            if name.endswith(suffixes) and not name.startswith(".")
        ]
    files = filter(Path.is_file, paths)
    return tuple(sorted(files, key=lambda file: file.relative_to(root).as_posix()))


def split_field(rest: str, default: str) -> tuple[str, str]:
    """Divides PATH#FIELD at the last #.

    PATH may contain a # as well: if a file has the whole text as its name, there is no field.

    Returns:
      (path, field); the field is `default` if none is named.
    """
    path, mark, field = rest.rpartition("#")
    is_path = not mark or (_exists(rest) and rest != path + "#")
    if is_path:
        return rest, default
    return path, field or default


def without_copies(files: tuple[Path, ...]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Leaves out a.txt.gz if a.txt is among the files.

    Returns:
      (files, what was left out and why).
    """
    present = set(files)
    copies = {
        file
        for file in files
        if file.suffix in COMPRESSED_SUFFIXES and file.with_suffix("") in present
    }
    kept = tuple(file for file in files if file not in copies)
    return kept, tuple(f"{file.name} (compressed copy of {file.stem})" for file in sorted(copies))


def listed(names: tuple[str, ...], most: int = 3) -> str:
    """Joins the first names with commas, and counts the others."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def fixed_folder(pattern: Path) -> Path:
    """Returns the part of a glob before its first wildcard."""
    parts = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1])
    return Path(*parts)


def _glob_files(pattern: Path) -> tuple[Path, ...]:
    matches = (Path(match) for match in sorted(glob.glob(str(pattern), recursive=True)))
    return tuple(match for match in matches if match.is_file())


def _exists(path: str) -> bool:
    root = expanded(path)
    return root.exists() or bool(_glob_files(root))
