"""Files of token ids: which bytes are ids, and how many bytes one id takes.

Ids are little-endian whole numbers. A file starts with one of these:

- no header: nanoGPT's `.bin`. The width is recognised from a sample (`qkvjax.data.token_widths`) or
  named, as in `tokens:PATH#uint32`;
- the header of llm.c, 256 int32 (magic, version, number of ids, ...), which modded-nanogpt writes
  as well;
- the header of numpy, in a `.npy` file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from qkvjax.data.compression import compression_of, first_bytes
from qkvjax.data.formats import HEAD, Format, identify, token_header, wrong_format
from qkvjax.errors import UserError

# Signed ids are read as unsigned ones of the same width.
DTYPES = {
    "uint16": "<u2",
    "uint32": "<u4",
    "int32": "<u4",
    "uint64": "<u8",
    "int64": "<u8",
}
# (magic, version) of llm.c's headers, and the type of the ids after them.
_HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
_HEADER_BYTES = 256 * 4
_WANTED = "tokens: takes files of ids"
_TOKEN_SUFFIXES = ("", ".bin")
_MIN_TEXT_BYTES = 64  # a shorter head of ids may look like text by chance


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of ids, and where in it they are.

    Attributes:
      offset: bytes before the first id.
      count: number of ids; 0 while `dtype` is unknown.
      dtype: of numpy; None if the file does not tell.
    """

    path: Path
    offset: int
    count: int
    dtype: np.dtype | None


def open_shard(path: Path, dtype: str | None = None) -> Shard:
    """Reads the header of a file of ids, or finds that it has none.

    Args:
      dtype: the type of the ids, one of DTYPES; None takes it from the file.

    Raises:
      UserError: another format, a header of an unknown version, a truncated file.
    """
    head = first_bytes(path, HEAD)
    size = path.stat().st_size
    if not size:
        raise UserError(f"{path} is empty: tokens: takes uint16 or uint32 ids")
    if head.startswith(b"\x93NUMPY"):
        shard = _open_numpy(path)
    elif header := token_header(head):
        shard = _open_llm_c(path, size, header)
    else:
        _refuse_other_formats(path, head)
        shard = Shard(path, offset=0, count=0, dtype=None)
        return with_dtype(shard, np.dtype(DTYPES[dtype])) if dtype else shard
    if dtype and np.dtype(DTYPES[dtype]).itemsize != shard.dtype.itemsize:
        raise UserError(
            f"{path} says in its header that its ids are {shard.dtype.name}: leave #{dtype} out"
        )
    return shard


def with_dtype(shard: Shard, dtype: np.dtype) -> Shard:
    """Returns a file without a header as ids of this type.

    Raises:
      UserError: the size of the file is not a multiple of the size of an id.
    """
    size = shard.path.stat().st_size
    if size % dtype.itemsize:
        problem = "an odd number"
        if dtype.itemsize != 2:
            problem = f"not a multiple of {dtype.itemsize}"
        raise UserError(
            f"{shard.path} has {size:,} bytes, {problem}: ids of {dtype.name} take {dtype.itemsize}"
            " bytes each, so the file is truncated or holds something else"
        )
    return Shard(shard.path, offset=0, count=size // dtype.itemsize, dtype=dtype)


def _open_numpy(path: Path) -> Shard:
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


def _open_llm_c(path: Path, size: int, header: tuple[int, int, int]) -> Shard:
    magic, version, count = header
    name = _HEADERS.get((magic, version))
    if name is None:
        raise UserError(
            f"{path} has a header like llm.c's with magic {magic} and version {version}, and"
            f" {_WANTED}: supported headers have magic 20240520 and version 1 (uint16), or magic"
            " 20240801 and version 7 (uint32)"
        )
    dtype = np.dtype(name)
    expected_size = _HEADER_BYTES + count * dtype.itemsize
    if size != expected_size or count < 1:
        problem = "is truncated" if size < expected_size else "is damaged"
        raise UserError(
            f"{path} {problem}: its header says {count:,} ids of {dtype.name}, which take"
            f" {expected_size:,} bytes, and it has {size:,}: copy it again"
        )
    return Shard(path, _HEADER_BYTES, count, dtype)


def _refuse_other_formats(path: Path, head: bytes) -> None:
    """Raises UserError for a file without a header that is recognised as something else."""
    _refuse_library_formats(path)
    if compression := compression_of(head):
        raise UserError(
            f"{path} is compressed ({compression}), and token files are mapped into memory as they"
            " are: decompress it first"
        )
    content = identify(head)
    if content.name == "UTF-8 text" and len(head) >= _MIN_TEXT_BYTES:
        remedy = "use text:PATH, or jsonl:PATH#FIELD"
    elif _may_be_ids(path, content):
        return
    elif content.remedy.startswith(("use", "unpack", "fetch")):
        remedy = content.remedy
    else:
        remedy = "write the ids with numpy as uint16 or uint32"
    raise wrong_format(path, dataclasses.replace(content, remedy=remedy), _WANTED)


def _may_be_ids(path: Path, content: Format) -> bool:
    """Returns whether ids may look like this format by chance."""
    if content.evidence == "content":
        return True
    return content.evidence == "short magic" and path.suffix in _TOKEN_SUFFIXES


def _refuse_library_formats(path: Path) -> None:
    """Raises UserError for ids that a file beside them divides into documents or chunks."""
    megatron_index = path.with_suffix(".idx")
    if megatron_index.is_file() and path.suffix != ".idx":
        raise UserError(
            f"{path} belongs to a Megatron data set: {megatron_index.name} beside it says where its"
            f" documents are and how wide its ids are, and {_WANTED} alone: write them with numpy"
            " as uint16 or uint32, with a separator after each document"
        )
    streaming_index = path.parent / "index.json"
    if streaming_index.is_file() and path.name in streaming_index.read_text(errors="replace"):
        raise UserError(
            f"{path} is a chunk of a streaming data set (index.json beside it lists it), and"
            f" {_WANTED} alone: write them with numpy as uint16 or uint32"
        )
