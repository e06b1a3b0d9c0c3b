"""The tokenised documents of each split, read from parts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qkvjax.data.cutting import DocumentCut, cut_document
from qkvjax.data.packing import num_packed_rows, num_windows
from qkvjax.data.parts import Part, Parts
from qkvjax.data.split import Split
from qkvjax.data.tokenizers import Tokenizer


class Corpus:
    """The documents of `parts`, divided as `split` says."""

    def __init__(self, parts: Parts, split: Split, tokenizer: Tokenizer):
        self._parts = parts
        self._split = split
        self._tokenizer = tokenizer
        self._cuts: dict[bytes, DocumentCut] = {}

    def stream(self, name: str) -> Iterator[np.ndarray]:
        """Yields the ids of a split: a separator, then t1..tn, of every document.

        The arrays [n] follow each other; where one ends has no meaning.
        """
        separator = np.array([self._tokenizer.separator], np.int32)
        for part in self._parts:
            if self._split.by_position:
                for arrays in self._shares(part, name):
                    yield separator
                    yield from arrays
            else:
                yield from self._runs(part, name)

    def documents(self, name: str) -> Iterator[np.ndarray]:
        """Yields the ids of each document of a split, [n], without separators."""
        for part in self._parts:
            if self._split.by_position:
                for arrays in self._shares(part, name):
                    yield arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            else:
                for number in np.flatnonzero(self._in_split(part, name)):
                    yield part.document(number)

    def num_rows(self, name: str, seq_len: int, packed: bool, first_only: bool) -> tuple[int, int]:
        """Returns (rows, tokens without separators) of a split.

        Reads the index of each part, and of its tokens only those of documents that are cut.

        Args:
          packed: rows are cut from one stream; otherwise they are windows of each document.
          first_only: one window a document.
        """
        num_rows = 0
        num_tokens = 0
        num_documents = 0
        for lengths in self._lengths(name):
            num_documents += len(lengths)
            num_tokens += int(lengths.sum())
            num_rows += len(lengths) if first_only else int(num_windows(lengths, seq_len).sum())
        if packed:
            num_rows = num_packed_rows(num_tokens + num_documents, seq_len)
        return num_rows, num_tokens

    def sizes(self, name: str) -> tuple[int, int]:
        """Returns (bytes of a split, bytes of the largest document in it)."""
        total = 0
        largest = 0
        for part in self._parts:
            if self._split.by_position:
                num_bytes = np.array(
                    [self._share_bytes(part, number, name) for number in range(len(part))], np.int64
                )
            else:
                num_bytes = part.num_bytes[self._in_split(part, name)]
            total += int(num_bytes.sum())
            largest = max(largest, int(num_bytes.max(initial=0)))
        return total, largest

    def _lengths(self, name: str) -> Iterator[np.ndarray]:
        """Yields int64 [n] for each part: the tokens of each of its documents in a split."""
        for part in self._parts:
            if self._split.by_position:
                lengths = [sum(map(len, arrays)) for arrays in self._shares(part, name)]
                yield np.array(lengths, np.int64)
            else:
                yield part.num_ids[self._in_split(part, name)]

    def _in_split(self, part: Part, name: str) -> np.ndarray:
        """Returns bool [documents], which documents belong to a split by content."""
        return self._split.held_out(part.digests) == (name == "validation")

    def _runs(self, part: Part, name: str) -> Iterator[np.ndarray]:
        """Yields the ids of each run of consecutive documents of a split, with separators."""
        in_split = self._in_split(part, name)
        changes = np.flatnonzero(np.diff(in_split, prepend=False, append=False))
        bounds = np.append(part.starts, len(part.ids))
        for first, after in changes.reshape(-1, 2):
            yield part.ids[bounds[first] : bounds[after]]

    def _shares(self, part: Part, name: str) -> Iterator[list[np.ndarray]]:
        """Yields what a split by position has of each document, where it has something.

        Each share is a list of non-empty arrays of ids that follow each other.
        """
        for number in range(len(part)):
            if arrays := self._share(part, number, name):
                yield arrays

    def _share(self, part: Part, number: int, name: str) -> list[np.ndarray]:
        ids = part.document(number)
        digest = part.digests[number].tobytes()
        position = self._split.cuts[digest]
        held_out = name == "validation"
        if position == 0:
            return [ids] if held_out else []
        if position == part.num_bytes[number]:
            return [] if held_out else [ids]
        if digest not in self._cuts:
            self._cuts[digest] = cut_document(self._tokenizer, ids, position)
        return self._cuts[digest].side(ids, held_out)

    def _share_bytes(self, part: Part, number: int, name: str) -> int:
        """Returns the bytes that a split by position has of a document."""
        cut = self._split.cuts[part.digests[number].tobytes()]
        return int(part.num_bytes[number]) - cut if name == "validation" else cut
