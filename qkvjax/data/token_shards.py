"""Files of token ids: which bytes are ids, how wide they are, and many files as one stream.

Ids are little-endian whole numbers behind one of three heads:

- none: nanoGPT's `.bin`; the width is recognised, or named as `tokens:PATH#uint32`;
- llm.c's 256 int32 (magic, version, number of ids, ...), which modded-nanogpt writes as well;
- numpy's, of a `.npy` file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from qkvjax.data.compression import compression_of, first_bytes
from qkvjax.data.formats import HEAD, identify, refusal, token_header
from qkvjax.errors import UserError

DTYPES = {
    "uint16": "<u2",
    "uint32": "<u4",
    "int32": "<u4",
    "uint64": "<u8",
    "int64": "<u8",
}
_HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
_HEADER_BYTES = 256 * 4
_WANTED = "tokens: takes files of ids"
_TOKEN_SUFFIXES = ("", ".bin")
_FEWEST_LETTERS = 64  # ids may look like less text than this by chance


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of ids.

    Attributes:
      offset: bytes in front of the first id.
      count: ids, where `dtype` is known.
      dtype: of numpy; None where the file does not say.
    """

    path: Path
    offset: int
    count: int
    dtype: np.dtype | None


def open_shard(path: Path, dtype: str | None = None) -> Shard:
    """Looks at a file of ids.

    Args:
      dtype: what its ids are, of DTYPES; None asks the file.

    Raises:
      UserError: another format, a header of an unknown version, a truncated file.
    """
    head = first_bytes(path, HEAD)
    size = path.stat().st_size
    if not size:
        raise UserError(f"{path} is empty: tokens: takes uint16 or uint32 ids")
    if head.startswith(b"\x93NUMPY"):
        shard = _numpy(path)
    elif header := token_header(head):
        shard = _llm_c(path, size, header)
    else:
        _refuse_others(path, head)
        shard = Shard(path, 0, 0, None)
        return with_dtype(shard, np.dtype(DTYPES[dtype])) if dtype else shard
    if dtype and np.dtype(DTYPES[dtype]).itemsize != shard.dtype.itemsize:
        raise UserError(
            f"{path} says in its header that its ids are {shard.dtype.name}: leave #{dtype} out"
        )
    return shard


def with_dtype(shard: Shard, dtype: np.dtype) -> Shard:
    """Returns a file without a header as ids of this type.

    Raises:
      UserError: its size is no multiple of theirs.
    """
    size = shard.path.stat().st_size
    if size % dtype.itemsize:
        what = "an odd number" if dtype.itemsize == 2 else f"no multiple of {dtype.itemsize}"
        raise UserError(
            f"{shard.path} has {size:,} bytes, {what}: ids of {dtype.name} take {dtype.itemsize}"
            " bytes each, so it is truncated or something else"
        )
    return Shard(shard.path, 0, size // dtype.itemsize, dtype)


def _numpy(path):
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is a damaged numpy array ({error}): save it again") from None
    if array.ndim != 1 or array.dtype.kind not in "ui" or not len(array):
        raise UserError(
            f"{path} is a numpy array of {array.dtype} {list(array.shape)}, and {_WANTED}: save"
            " them as one array [n] of uint16 or uint32"
        )
    return Shard(path, array.offset, len(array), array.dtype)


def _llm_c(path, size, header):
    magic, version, count = header
    dtype = _HEADERS.get((magic, version))
    if dtype is None:
        raise UserError(
            f"{path} has a header of llm.c's kind, of magic {magic} and version {version}, and"
            f" {_WANTED}: of such headers those of 20240520, version 1 (uint16), and 20240801,"
            " version 7 (uint32)"
        )
    dtype = np.dtype(dtype)
    due = _HEADER_BYTES + count * dtype.itemsize
    if size != due or count < 1:
        what = "is truncated" if size < due else "is damaged"
        raise UserError(
            f"{path} {what}: its header says {count:,} ids of {dtype.name}, which take {due:,}"
            f" bytes, and it has {size:,}: copy it again"
        )
    return Shard(path, _HEADER_BYTES, count, dtype)


def _refuse_others(path, head):
    """Raises UserError for a file without a header that is known to be no plain ids."""
    if path.with_suffix(".idx").is_file() and path.suffix != ".idx":
        raise UserError(
            f"{path} belongs to a Megatron data set: {path.with_suffix('.idx').name} beside it says"
            f" where its documents are and how wide its ids, and {_WANTED} alone: write them with"
            " numpy as uint16 or uint32, a separator behind each document"
        )
    index = path.parent / "index.json"
    if index.is_file() and path.name in index.read_text(errors="replace"):
        raise UserError(
            f"{path} is a chunk of a streaming data set (index.json beside it lists it), and"
            f" {_WANTED} alone: write them with numpy as uint16 or uint32"
        )
    if packed := compression_of(head):
        raise UserError(
            f"{path} is compressed ({packed}), and token files are mapped into memory as they are:"
            " decompress it first"
        )
    found = identify(head)
    remedy = "write the ids with numpy as uint16 or uint32"
    if found.remedy.startswith(("use", "unpack", "fetch")):
        remedy = found.remedy
    if found.name == "UTF-8 text" and len(head) >= _FEWEST_LETTERS:
        remedy = "use text:PATH, or jsonl:PATH#FIELD"
    elif found.evidence == "content" or (
        found.evidence == "short magic" and path.suffix in _TOKEN_SUFFIXES
    ):
        return  # ids may look so by chance
    raise refusal(path, dataclasses.replace(found, remedy=remedy), _WANTED)
