"""Tokenised documents on disk, in parts that remain when the process that wrote them is stopped.

A part is two files. `00007.ids` has the ids of some whole documents, with a separator before each.
`00007.npz` is its index: sizes of the documents and what identifies them. The index is written
last, so a part that has one is complete.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PART_BYTES = 32 << 20  # of text, about; a process that is killed loses at most this much


@dataclasses.dataclass(frozen=True)
class Part:
    """Some documents.

    Attributes:
      ids: [n], a memory map: separator, t1..tn of each document.
      digests: uint8 [documents, 32], the sha256 of each.
      num_bytes: int64 [documents], of the text.
      num_ids: int64 [documents], without the separators.
      starts: int64 [documents], the position of each document's separator in `ids`.
    """

    ids: np.ndarray
    digests: np.ndarray
    num_bytes: np.ndarray
    num_ids: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self.num_ids)

    def document(self, number: int) -> np.ndarray:
        """Returns the ids of one document, [n], without its separator."""
        start = self.starts[number] + 1
        return self.ids[start : start + self.num_ids[number]]


class Parts:
    """The parts in a folder, in order, and a writer that adds more.

    Args:
      folder: exists.
      dtype: of the ids on disk; an attribute.
      separator: an id.
    """

    def __init__(self, folder: Path, dtype, separator: int):
        self._folder = folder
        self.dtype = np.dtype(dtype)
        self._separator = separator
        self._count = 0
        while self._index_path(self._count).is_file():
            self._count += 1
        self._file = None  # of the part that is being written

    def __len__(self) -> int:
        """Returns the number of complete parts."""
        return self._count

    def __iter__(self) -> Iterator[Part]:
        """Yields the complete parts; only one index is in memory at a time."""
        for number in range(self._count):
            yield self._load(number)

    def _load(self, number: int) -> Part:
        with np.load(self._index_path(number)) as index:
            digests = index["digests"]
            num_bytes = index["num_bytes"]
            num_ids = index["num_ids"]
        sizes = num_ids + 1  # with the separators
        ids = np.memmap(self._ids_path(number), self.dtype, mode="r", shape=(int(sizes.sum()),))
        return Part(ids, digests, num_bytes, num_ids, starts=np.cumsum(sizes) - sizes)

    def begin_document(self) -> None:
        """Writes a separator, into a new part if none is open."""
        if self._file is None:
            self._file = open(self._ids_path(self._count), "wb")
            self._documents = []
            self._bytes = 0
        self._file.write(np.array([self._separator], self.dtype).tobytes())
        self._num_ids = 0

    def add(self, ids: np.ndarray) -> None:
        """Adds ids to the document that was begun last."""
        self._file.write(ids.astype(self.dtype).tobytes())
        self._num_ids += len(ids)

    def end_document(self, digest: bytes, num_bytes: int) -> None:
        """Counts the document, and completes a part that is large enough."""
        self._documents.append((digest, num_bytes, self._num_ids))
        self._bytes += num_bytes
        if self._bytes >= PART_BYTES:
            self.finish()

    def finish(self) -> None:
        """Completes the open part, if any."""
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())  # the ids must be on disk before the index is
        self._file.close()
        self._file = None
        digests, num_bytes, num_ids = zip(*self._documents, strict=True)
        unfinished = self._folder / "index.partial"
        with open(unfinished, "wb") as file:
            np.savez(
                file,
                digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
                num_bytes=np.array(num_bytes, np.int64),
                num_ids=np.array(num_ids, np.int64),
            )
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self._index_path(self._count))
        self._count += 1

    def _ids_path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.ids"

    def _index_path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.npz"
