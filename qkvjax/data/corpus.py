"""The tokenised documents of each split, read from parts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qkvjax.data import words
from qkvjax.data.packing import num_packed_rows, num_windows
from qkvjax.data.parts import Part, Parts
from qkvjax.data.split import Split, boundary
from qkvjax.data.tokenizers import Tokenizer

_WINDOW = 1 << 16  # bytes around the cut of a document that are looked at first


class Corpus:
    """The documents of `parts`, as `split` divides them."""

    def __init__(self, parts: Parts, split: Split, tokenizer: Tokenizer):
        self._parts = parts
        self._split = split
        self._tokenizer = tokenizer
        self._cuts = {}

    def stream(self, name: str) -> Iterator[np.ndarray]:
        """The ids of a split, separator, t1..tn of every document, in arrays [n] as they lie."""
        separator = np.array([self._tokenizer.separator], np.int32)
        for part in self._parts:
            if self._split.last_held_out is None:
                for number in range(len(part.num_ids)):
                    if some := self._share(part, number, name):
                        yield from (separator, *some)
                continue
            chosen = self._chosen(part, name)
            edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
            bounds = np.append(part.starts, len(part.ids))
            for first, after in edges.reshape(-1, 2):
                yield part.ids[bounds[first] : bounds[after]]

    def documents(self, name: str) -> Iterator[np.ndarray]:
        """The ids of each document of a split, [n], without separators."""
        for part in self._parts:
            if self._split.last_held_out is None:
                for number in range(len(part.num_ids)):
                    if some := self._share(part, number, name):
                        yield some[0] if len(some) == 1 else np.concatenate(some)
                continue
            for number in np.flatnonzero(self._chosen(part, name)):
                yield _ids(part, number)

    def num_rows(self, name: str, seq_len: int, packed: bool, first_only: bool) -> tuple[int, int]:
        """(rows, tokens without separators) of a split, without reading its tokens.

        Args:
          packed: rows are cut from one stream, else windows of each document.
          first_only: one window a document.
        """
        rows, tokens, documents = 0, 0, 0
        for lengths in self._lengths(name):
            documents += len(lengths)
            tokens += int(lengths.sum())
            rows += len(lengths) if first_only else int(num_windows(lengths, seq_len).sum())
        return num_packed_rows(tokens + documents, seq_len) if packed else rows, tokens

    def sizes(self, name: str) -> tuple[int, int]:
        """(bytes of a split, bytes of the largest document in it)."""
        total, largest = 0, 0
        for part in self._parts:
            if self._split.last_held_out is None:
                sizes = [self._num_bytes(part, number, name) for number in range(len(part.num_ids))]
                sizes = np.array(sizes, np.int64)
            else:
                sizes = part.num_bytes[self._chosen(part, name)]
            total += int(sizes.sum())
            largest = max(largest, int(sizes.max(initial=0)))
        return total, largest

    def _lengths(self, name):
        """int64 [n] of each part: tokens of its documents in a split."""
        for part in self._parts:
            if self._split.last_held_out is None:
                shares = [self._share(part, number, name) for number in range(len(part.num_ids))]
                yield np.array([sum(map(len, some)) for some in shares if some], np.int64)
            else:
                yield part.num_ids[self._chosen(part, name)]

    def _chosen(self, part, name):
        return self._split.held_out(part.digests) == (name == "validation")

    def _num_bytes(self, part, number, name):
        size = int(part.num_bytes[number])
        cut = self._split.cuts[part.digests[number].tobytes()]
        return size - cut if name == "validation" else cut

    def _share(self, part, number, name) -> list[np.ndarray]:
        """The ids of one side of a document that is split by position; empty where it has none."""
        ids = _ids(part, number)
        at = self._split.cuts[part.digests[number].tobytes()]
        held_out = name == "validation"
        if at in (0, part.num_bytes[number]):
            return [ids] if (at == 0) == held_out else []
        digest = part.digests[number].tobytes()
        if digest not in self._cuts:
            self._cuts[digest] = self._cut(ids, at)
        before, head, tail, after = self._cuts[digest]
        some = (tail, ids[after:]) if held_out else (ids[:before], head)
        return [ids for ids in some if len(ids)]

    def _cut(self, ids, at):
        """(before, head, tail, after): ids[:before] and head are a document up to byte `at`, tail
        and ids[after:] the rest; only what lies near to the cut is tokenised again.
        """
        window = _WINDOW
        left = right = None
        while left is None or right is None:
            first, first_byte = self._token_at(ids, max(0, at - window))
            last, _ = self._token_at(ids, at + window)
            text = self._tokenizer.bytes_of(ids[first:last])
            cut = boundary(text, at - first_byte)
            left, right = self._around(text, cut, first == 0, last == len(ids))
            window *= 16
        head = self._tokenizer.encode(text[left:cut])
        tail = self._tokenizer.encode(text[cut:right])
        before, _ = self._token_at(ids, first_byte + left)
        after, _ = self._token_at(ids, first_byte + right)
        return before, head, tail, after

    def _around(self, text, cut, at_start, at_end):
        """Where, before and after a cut, a text may be cut without other ids; None: not seen."""
        how = self._tokenizer.cuts
        if how == "anywhere":
            return cut, cut
        if how == "nowhere":
            return (0 if at_start else None), (len(text) if at_end else None)
        start = 0 if at_start else next(i for i in range(4) if text[i] & 0xC0 != 0x80)
        left = words.safe_cut(text, start, cut)
        right = words.next_cut(text, cut)
        if left is None and at_start:
            left = 0
        if right is None and at_end:
            right = len(text)
        return left, right

    def _token_at(self, ids, at):
        """(token, its first byte): the one that holds byte `at` of the document, or its end."""
        before = 0
        for start in range(0, len(ids), 1 << 20):
            ends = np.cumsum(self._tokenizer.num_bytes[ids[start : start + (1 << 20)]])
            if before + ends[-1] > at:
                token = int(np.searchsorted(ends, at - before, side="right"))
                return start + token, before + (int(ends[token - 1]) if token else 0)
            before += int(ends[-1])
        return len(ids), before


def _ids(part: Part, number) -> np.ndarray:
    start = part.starts[number] + 1
    return part.ids[start : start + part.num_ids[number]]
