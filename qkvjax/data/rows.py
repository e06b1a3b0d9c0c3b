"""Rows of T + 1 tokens by index, from a prepared copy or directly from token files.

Rows of the train split are cut from one stream, or are windows of documents. Those of validation
are always windows, and know the number of the document of each.
"""

from __future__ import annotations

import dataclasses
import functools
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from qkvjax.data.packing import num_packed_rows, num_windows, window
from qkvjax.data.store import damaged
from qkvjax.data.token_files import TokenStream

_CACHE_BYTES = 512 * 2**20
_SCAN_ROWS = 1024  # read at once to number the documents


class Rows(Protocol):
    """Rows of T + 1 tokens."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the rows at these indices, int32 [R, T + 1]."""
        ...


class DocumentRows(Rows, Protocol):
    """Rows that are windows of documents."""

    def documents(self, separator: int) -> np.ndarray:
        """Returns int32 [rows], the number of the document of each window."""
        ...


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """Rows that `builder.write` prepared; the last blocks stay in memory, up to 512 MB."""

    folder: Path
    split: str
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the rows at these indices, int32 [R, T + 1].

        Raises:
          UserError: the prepared copy is damaged.
        """
        try:
            block_rows, block = self._blocks
            rows = [block(int(i) // block_rows)[int(i) % block_rows] for i in indices]
        except (IndexError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001  (array_record, protobuf, TFDS raise their own)
            raise damaged(self.folder, error) from error
        return np.stack(rows).astype(np.int32)

    @functools.cached_property
    def _blocks(self):
        """(rows of a block, function from the number of a block to its rows)."""
        from qkvjax.data import builder  # imports TFDS, which finding prepared data does not need

        blocks = builder.read(self.folder, self.split)
        num_cached = max(1, _CACHE_BYTES // blocks[0]["tokens"].nbytes)
        read_block = functools.lru_cache(num_cached)(lambda i: blocks[i]["tokens"])
        return builder.BLOCK_ROWS, read_block

    def documents(self, separator: int) -> np.ndarray:
        """Returns int32 [rows], the number of the document of each window.

        The first call reads every window once, and keeps the numbers in a file beside them.
        """
        path = self.folder / f"{self.split}_documents.npy"
        if path.exists():
            return np.load(path)
        numbers = self._number_documents(separator)
        # Other processes, on other machines too, may write the same file: each uses its own draft.
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.npy")
        try:
            np.save(draft, numbers)
            draft.replace(path)
        except OSError:  # the folder is read-only: every process computes the numbers
            return numbers
        return np.load(path)

    def _number_documents(self, separator: int) -> np.ndarray:
        """Counts the windows that begin with the separator: each is the first of its document."""
        is_first = []
        for start in range(0, self.count, _SCAN_ROWS):
            rows = self.read(range(start, min(start + _SCAN_ROWS, self.count)))
            is_first.append(rows[:, 0] == separator)
        return np.cumsum(np.concatenate(is_first), dtype=np.int32) - 1


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """A stream of ids, cut every T tokens."""

    stream: TokenStream
    seq_len: int

    def __len__(self) -> int:
        return num_packed_rows(len(self.stream.tokens), self.seq_len)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the rows at these indices, int32 [R, T + 1]."""
        starts = np.asarray(indices, np.int64) * self.seq_len
        rows = [self.stream.tokens[start : start + self.seq_len + 1] for start in starts]
        return np.stack(rows).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class WindowRows:
    """The windows of each document, or only its window 0 with `first_only`."""

    stream: TokenStream
    seq_len: int
    separator: int
    first_only: bool = False

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the windows at these indices, int32 [R, T + 1]."""
        rows = []
        for index in indices:
            document = int(np.searchsorted(self._ends, index, side="right"))
            first_window = int(self._ends[document - 1]) if document else 0
            start, end = self.stream.spans[document]
            tokens = self.stream.tokens[start:end]
            rows.append(window(tokens, int(index) - first_window, self.separator, self.seq_len))
        return np.stack(rows)

    def documents(self, separator: int) -> np.ndarray:
        """Returns int32 [rows], the number of the document of each window."""
        return np.searchsorted(self._ends, np.arange(len(self)), side="right").astype(np.int32)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """int64 [documents]: windows up to and including each document."""
        spans = self.stream.spans
        if self.first_only:
            return np.arange(1, len(spans) + 1)
        return np.cumsum(num_windows(spans[:, 1] - spans[:, 0], self.seq_len))
