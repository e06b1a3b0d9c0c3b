"""The ids of many files as one stream."""

from __future__ import annotations

import functools

import numpy as np

from qkvjax.data.token_shards import Shard

_MAPPED_FILES = 64  # that are open at a time: there may be more shards than open files are allowed


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
