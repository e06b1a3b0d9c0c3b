"""Compressed files, decompressed while they are read: gzip, zstd, bz2, xz and lz4."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qkvjax.errors import UserError

# How a file of each format starts, whatever its name. A zstd file may start with a skippable frame.
_STARTS = {
    "gzip": rb"\x1f\x8b\x08",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "bz2": rb"BZh[1-9](1AY&SY|\x17\x72E8P\x90)",
    "xz": rb"\xfd7zXZ\0",
    "lz4": rb"\x04\x22\x4d\x18",
}
_OPENERS = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
_BUFFER_BYTES = 1 << 16
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)


def compression_of(head: bytes) -> str:
    """Returns "gzip", "zstd", "bz2", "xz", "lz4", or "" for the first bytes of a plain file."""
    return next((name for name, start in _STARTS.items() if re.match(start, head, re.DOTALL)), "")


def first_bytes(path: Path, number: int) -> bytes:
    """Reads the first bytes of a file, not decompressed.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(number)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check that it is there, and its permissions"
        ) from None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to read its content, decompressed.

    Raises:
      UserError: the file cannot be opened; in the `with` block: it is compressed, and damaged or
        truncated.
    """
    name = compression_of(first_bytes(path, 16))
    if not name:
        with open(path, "rb") as file:
            yield file
        return
    try:
        with _open_compressed(path, name) as file:
            yield file
    except _DAMAGE as error:
        raise UserError(
            f"{path} is compressed ({name}), and damaged or truncated ({error}): copy it again"
        ) from None


def _open_compressed(path: Path, name: str) -> BinaryIO:
    if name in _OPENERS:
        return _OPENERS[name](path, "rb")
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), name)
    return io.BufferedReader(stream, _BUFFER_BYTES)
