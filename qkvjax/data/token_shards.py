"""Files of token ids: which bytes are ids, how wide they are, and many files as one stream.

Ids are little-endian whole numbers behind one of three heads:

- none: nanoGPT's `.bin`; the width is recognised, or named as `tokens:PATH#uint32`;
- llm.c's 256 int32 (magic, version, number of ids, ...), which modded-nanogpt writes as well;
- numpy's, of a `.npy` file.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from qkvjax.data.compression import compression_of, first_bytes
from qkvjax.data.files import listed
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
_MAPPED_FILES = 64  # that are open at a time: there may be more shards than open files are allowed
# A sample of so many blocks tells how wide ids are.
_BLOCKS, _BLOCK_BYTES = 64, 1 << 13
_FEWEST = 8  # pairs of 16 bits that allow a verdict
_SMALL = 15  # the upper 16 bits of an id of a vocabulary of up to a million


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


def doubt(shard: Shard) -> str:
    """Returns what speaks against the type that was named for a file without a header, or ""."""
    width = _width(shard) if not shard.offset else None
    if width in (None, shard.dtype.itemsize):
        return ""
    named = f"{shard.path} is read as {shard.dtype.name}, as it was named"
    return f"{named}, and looks like uint{8 * width}"


def recognise(shards: list[Shard], num_ids: int, name: str) -> list[Shard]:
    """Gives every shard without a header its dtype, from a sample of its content.

    The upper halves of 32-bit ids are zero or nearly so and their lower halves are not; of 16-bit
    ids both halves of a pair are alike.

    Args:
      num_ids: of the tokenizer; above 65,537 ids do not fit 16 bits.
      name: `data.source`, for messages.

    Raises:
      UserError: the sample does not tell, or the files differ.
    """
    unknown = [shard for shard in shards if shard.dtype is None]
    verdicts = {shard: _width(shard) for shard in unknown}
    for shard, width in verdicts.items():
        if width == 2 and num_ids > 2**16 + 1:
            raise UserError(
                f"{shard.path} looks like uint16 ids, and the {num_ids:,} ids of the tokenizer take"
                " 32 bits: set data.tokenizer to the one that wrote the file, or, where it uses low"
                f" ids only, name the type as {name}#uint16"
            )
    widths = set(filter(None, verdicts.values()))
    if len(widths) > 1:
        files = (f"{s.path.name} ({8 * w} bits)" for s, w in verdicts.items() if w)
        raise UserError(f"{name} has files of different widths: {listed(tuple(files))}: name one")
    if unknown and not widths:
        if num_ids <= 2**16 + 1:
            raise UserError(
                f"{unknown[0].path} does not tell whether its ids are uint16 or uint32: name the"
                f" type as {name}#uint16 or {name}#uint32"
            )
        widths = {4}
    return [
        with_dtype(shard, np.dtype(f"<u{widths.copy().pop()}")) if shard.dtype is None else shard
        for shard in shards
    ]


class Ids:
    """The ids of several files as one stream; a slice reads what it covers and nothing else.

    Args:
      shards: in order.
      start, stop: which part of the stream this is.
      ends: ids that are read as `separator`.
    """

    def __init__(
        self,
        shards: list[Shard],
        start: int = 0,
        stop: int | None = None,
        ends: tuple[int, ...] = (),
        separator: int = 0,
    ):
        self._shards = shards
        self._limits = np.cumsum([0, *(shard.count for shard in shards)])
        self._start = start
        self._stop = int(self._limits[-1]) if stop is None else stop
        self._ends = tuple(end for end in ends if end != separator)
        self._separator = separator
        self._mapped = functools.lru_cache(_MAPPED_FILES)(self._map)

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def nbytes(self) -> int:
        """Bytes that the ids take in the files."""
        limits = np.clip(self._limits, self._start, self._stop)
        sizes = (shard.dtype.itemsize for shard in self._shards)
        return sum(int(count) * size for count, size in zip(np.diff(limits), sizes))

    def part(self, start: int, stop: int) -> Ids:
        """Returns the ids from start to stop as a stream of their own."""
        return Ids(self._shards, self._start + start, self._start + stop)

    def with_ends(self, ends: tuple[int, ...], separator: int) -> Ids:
        """Returns the same stream, which shows every one of `ends` as the separator."""
        return Ids(self._shards, self._start, self._stop, ends, separator)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Reads ids[start:stop]: [n], of whole numbers."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError("ids are read in order: a step of 1")
        start, stop = start + self._start, max(start, stop) + self._start
        first = int(np.searchsorted(self._limits, start, side="right")) - 1
        pieces = []
        while start < stop:
            limit = min(stop, int(self._limits[first + 1]))
            before = int(self._limits[first])
            piece = self._mapped(first)[start - before : limit - before]
            is_whole = limit - start == stop - start and not pieces
            pieces.append(piece if is_whole else np.array(piece))  # a view keeps its file open
            start = limit
            first += 1
        ids = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, "<u2"), *pieces])
        if not self._ends:
            return ids
        return np.where(np.isin(ids, self._ends), np.int64(self._separator), ids)

    def _map(self, index):
        shard = self._shards[index]
        return np.memmap(shard.path, shard.dtype, "r", shard.offset, shard.count)


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


def _width(shard) -> int | None:
    """Bytes of an id by a sample of the file: 2, 4, 8, or None where it does not tell."""
    size = shard.path.stat().st_size
    if size % 4:
        return 2
    data = np.memmap(shard.path, "<u2", "r")
    block = _BLOCK_BYTES // 2
    starts = np.linspace(0, max(0, len(data) - block), _BLOCKS).astype(np.int64) // 4 * 4
    parts = [data[start : start + block] for start in np.unique(starts)]
    lower = np.concatenate([part[0::2] for part in parts])
    upper = np.concatenate([part[1::2] for part in parts])
    small_lower = float((lower <= _SMALL).mean())
    small_upper = float((upper <= _SMALL).mean())
    if small_upper == 1 and (not upper.any() or small_lower < 0.9):
        if len(upper) < _FEWEST or not lower.any():
            return None
        # Of 64-bit ids the upper 32 bits are zero throughout as well.
        is_wide = size % 8 == 0 and not lower[1::2].any() and not upper[1::2].any()
        return 8 if is_wide else 4
    if small_lower == 1 and small_upper < 0.5 and not lower.any():
        return None  # of another byte order, or shifted by a header
    return 2
