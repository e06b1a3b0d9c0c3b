"""Tokenised documents on disk, in parts that outlive the process that wrote them.

A part is two files: `00007.ids`, the ids of some whole documents, a separator before each, and
`00007.npz`, where they lie and what identifies them. The second is written last, so a part that has
it is complete.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PART_BYTES = 32 << 20  # of text, about: what a killed process loses at most


@dataclasses.dataclass(frozen=True)
class Part:
    """Some documents.

    Attributes:
      ids: [n], a memory map: separator, t1..tn of each document.
      digests: uint8 [documents, 32], their sha256.
      num_bytes: int64 [documents].
      num_ids: int64 [documents], without the separators.
      starts: int64 [documents], where in `ids` the separator of each stands.
    """

    ids: np.ndarray
    digests: np.ndarray
    num_bytes: np.ndarray
    num_ids: np.ndarray
    starts: np.ndarray


class Parts:
    """The parts in a folder, in order, and a writer that adds to them.

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
        while self._index(self._count).is_file():
            self._count += 1
        self._file = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Part]:
        """The finished parts; only the index of one is in memory at a time."""
        for number in range(self._count):
            yield self._load(number)

    def _load(self, number):
        with np.load(self._index(number)) as index:
            digests, num_bytes, num_ids = (index[n] for n in ("digests", "num_bytes", "num_ids"))
        sizes = num_ids + 1
        ids = np.memmap(self._ids(number), self.dtype, mode="r", shape=(int(sizes.sum()),))
        return Part(ids, digests, num_bytes, num_ids, np.cumsum(sizes) - sizes)

    def begin_document(self) -> None:
        """Opens a part if there is none, and puts a separator."""
        if self._file is None:
            self._file = open(self._ids(self._count), "wb")
            self._documents = []
            self._bytes = 0
        self._file.write(np.array([self._separator], self.dtype).tobytes())
        self._num_ids = 0

    def add(self, ids: np.ndarray) -> None:
        """Adds ids of the document that was begun last."""
        self._file.write(ids.astype(self.dtype).tobytes())
        self._num_ids += len(ids)

    def end_document(self, digest: bytes, num_bytes: int) -> None:
        """Counts the document; a part that is large enough is finished."""
        self._documents.append((digest, num_bytes, self._num_ids))
        self._bytes += num_bytes
        if self._bytes >= PART_BYTES:
            self.finish()

    def finish(self) -> None:
        """Completes the open part, if any."""
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
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
        unfinished.rename(self._index(self._count))
        self._count += 1

    def _ids(self, number):
        return self._folder / f"{number:05d}.ids"

    def _index(self, number):
        return self._folder / f"{number:05d}.npz"
