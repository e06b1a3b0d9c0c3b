"""Rows of T + 1 tokens by index, from a prepared copy or straight from token files.

All have len() and `read(indices [R]) -> int32 [R, T + 1]`; windows of documents also
`documents(separator) -> int32 [rows]`, the number of the document that each window is of.
"""

from __future__ import annotations

import dataclasses
import functools
import uuid
from pathlib import Path

import numpy as np

from qkvjax.data.packing import num_packed_rows, num_windows, window
from qkvjax.data.store import damaged
from qkvjax.data.token_files import TokenStream

_MEMORY = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """Rows that `builder.write` prepared; the blocks read last stay in memory, up to 512 MB."""

    folder: Path
    split: str
    count: int

    def __len__(self):
        return self.count

    @functools.cached_property
    def _blocks(self):
        from qkvjax.data import builder  # imports TFDS, which finding prepared data does not need

        blocks = builder.read(self.folder, self.split)
        most = max(1, _MEMORY // blocks[0]["tokens"].nbytes)
        return builder.BLOCK_ROWS, functools.lru_cache(most)(lambda i: blocks[i]["tokens"])

    def documents(self, separator: int) -> np.ndarray:
        """Returns int32 [rows], the number of the document of each window.

        The first window of a document begins with the separator. Every window is read once; the
        numbers are then kept in a file beside the windows.
        """
        path = self.folder / f"{self.split}_documents.npy"
        if not path.exists():
            starts = []
            for start in range(0, self.count, 1024):
                rows = self.read(range(start, min(start + 1024, self.count)))
                starts.append(rows[:, 0] == separator)
            numbers = np.cumsum(np.concatenate(starts), dtype=np.int32) - 1
            # A name of its own: other processes, on other machines too, may write the same file.
            draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.npy")
            try:
                np.save(draft, numbers)
                draft.replace(path)
            except OSError:  # the folder is read-only: every process computes the numbers
                return numbers
        return np.load(path)

    def read(self, indices):
        try:
            size, block = self._blocks
            rows = [block(int(i) // size)[int(i) % size] for i in indices]
        except (IndexError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001  (array_record, protobuf, TFDS: each its own)
            raise damaged(self.folder, error) from error
        return np.stack(rows).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """A stream of ids cut every T tokens."""

    stream: TokenStream
    seq_len: int

    def __len__(self):
        return num_packed_rows(len(self.stream.tokens), self.seq_len)

    def read(self, indices):
        starts = np.asarray(indices, np.int64) * self.seq_len
        rows = [self.stream.tokens[start : start + self.seq_len + 1] for start in starts]
        return np.stack(rows).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class WindowRows:
    """The windows of each document on its own, or with `first_only` its window 0 alone."""

    stream: TokenStream
    seq_len: int
    separator: int
    first_only: bool = False

    @functools.cached_property
    def _ends(self):
        """int64 [documents]: windows up to and including each document."""
        spans = self.stream.spans
        if self.first_only:
            return np.arange(1, len(spans) + 1)
        return np.cumsum(num_windows(spans[:, 1] - spans[:, 0], self.seq_len))

    def __len__(self):
        return int(self._ends[-1]) if len(self._ends) else 0

    def documents(self, separator: int) -> np.ndarray:
        """Returns int32 [rows], the number of the document of each window."""
        return np.searchsorted(self._ends, np.arange(len(self)), side="right").astype(np.int32)

    def read(self, indices):
        rows = []
        for index in indices:
            document = int(np.searchsorted(self._ends, index, side="right"))
            before = int(self._ends[document - 1]) if document else 0
            start, end = self.stream.spans[document]
            tokens = self.stream.tokens[start:end]
            rows.append(window(tokens, int(index) - before, self.separator, self.seq_len))
        return np.stack(rows)
