"""The ids of many files as one stream."""

from __future__ import annotations

import functools

import numpy as np

from qkvjax.data.token_shards import Shard

# A memory map keeps its file open, and a corpus may have more shards than a process may open files.
_MAX_MAPPED_FILES = 64


class Ids:
    """The ids of several files as one stream; a slice reads only what it covers.

    Args:
      shards: in order.
      start, stop: which part of the stream this is.
      ends: ids that are read as `separator`.
      separator: the id that replaces them.
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
        # Shard i holds the ids from limits[i] to limits[i + 1] of the whole stream.
        self._limits = np.cumsum([0, *(shard.count for shard in shards)])
        self._start = start
        self._stop = int(self._limits[-1]) if stop is None else stop
        self._ends = tuple(end for end in ends if end != separator)
        self._separator = separator
        self._mapped = functools.lru_cache(_MAX_MAPPED_FILES)(self._map)

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def nbytes(self) -> int:
        """Bytes that the ids take in the files."""
        limits = np.clip(self._limits, self._start, self._stop)
        counts = np.diff(limits).tolist()
        return sum(
            count * shard.dtype.itemsize for count, shard in zip(counts, self._shards, strict=True)
        )

    def part(self, start: int, stop: int) -> Ids:
        """Returns the ids from start to stop as another stream."""
        return Ids(self._shards, self._start + start, self._start + stop)

    def with_ends(self, ends: tuple[int, ...], separator: int) -> Ids:
        """Returns the same stream with each of `ends` read as the separator."""
        return Ids(self._shards, self._start, self._stop, ends, separator)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Reads ids[start:stop]: [n], whole numbers."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError("ids are read in order: the step must be 1")
        ids = self._read(start + self._start, max(start, stop) + self._start)
        if not self._ends:
            return ids
        return np.where(np.isin(ids, self._ends), np.int64(self._separator), ids)

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Reads ids `start` to `stop` of the whole stream; a view if one file holds them all."""
        pieces = []
        index = int(np.searchsorted(self._limits, start, side="right")) - 1
        position = start
        while position < stop:
            first = int(self._limits[index])
            limit = min(stop, int(self._limits[index + 1]))
            piece = self._mapped(index)[position - first : limit - first]
            if limit - position == stop - start:
                return piece
            pieces.append(np.array(piece))  # a copy, because a view would keep its file open
            position = limit
            index += 1
        return np.concatenate([np.empty(0, "<u2"), *pieces])

    def _map(self, index):
        shard = self._shards[index]
        return np.memmap(shard.path, shard.dtype, "r", shard.offset, shard.count)
