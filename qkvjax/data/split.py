"""Which documents are held out, and what identifies a corpus: its content alone.

The tenth of the documents with the smallest sha256 is validation: the choice depends on content
alone, identical documents fall on one side, and a document keeps its side when others come and go,
unless it is close to the limit. A source of fewer than 20 documents gives the last tenth of its
bytes, from a UTF-8 boundary on; of identical documents the first decides for all.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib

import numpy as np

from qkvjax.errors import UserError

SPLITS = ("train", "validation")
HELD_OUT = 10  # a tenth
# A source of fewer documents is split by position: a tenth of a few is none, or half of it all.
FEWEST_DOCUMENTS = 20


def check_split(split: str) -> None:
    """Raises UserError unless it is one of SPLITS."""
    if split not in SPLITS:
        raise UserError(f"split={split!r} is none of {', '.join(SPLITS)}")


@dataclasses.dataclass(frozen=True)
class Split:
    """How the documents of a corpus are divided.

    Attributes:
      num_documents, num_bytes: of the whole corpus.
      num_duplicates: documents that repeat an earlier one.
      digest: sha256, hexadecimal, over the sha256 of each document in order.
      last_held_out: documents whose rank is at most this are validation; None splits by position.
      cuts: sha256 -> the byte where the held-out part of a document begins, of a split by
        position; the last character before it is whole in either part, so the real cut may lie up
        to 3 bytes earlier.
      moved: whether duplicates made it another division than by position alone.
    """

    num_documents: int
    num_bytes: int
    num_duplicates: int
    digest: str
    last_held_out: int | None
    cuts: dict[bytes, int]
    moved: bool

    def held_out(self, digests: np.ndarray) -> np.ndarray:
        """bool [n], which documents are validation, of a split by content.

        Args:
          digests: uint8 [n, 32], the sha256 of each.
        """
        return ranks(digests) <= self.last_held_out


class Divider:
    """Learns of every document, in order, and then decides; it keeps eight bytes of each."""

    def __init__(self):
        self._digest = hashlib.sha256()
        self._ranks = array.array("Q")
        self._first: list[tuple[bytes, int]] = []
        self._num_bytes = 0

    def add(self, content: bytes, num_bytes: int) -> None:
        """Counts a document of this sha256."""
        self._digest.update(content)
        self._ranks.append(_rank(content))
        self._num_bytes += num_bytes
        if len(self._first) < FEWEST_DOCUMENTS:
            self._first.append((content, num_bytes))

    def divide(self, name: str, whole: bool = False) -> Split:
        """The split of all documents; with `whole` all of them are validation.

        Raises:
          UserError: no document came.
        """
        count = len(self._ranks)
        if not count:
            raise UserError(f"data.source={name!r} holds no text: all its documents are empty")
        ordered = np.frombuffer(self._ranks, np.uint64)
        ordered.sort()  # in place: there may be hundreds of millions
        first = np.ones(count, bool)
        np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
        distinct = int(np.count_nonzero(first))
        last, cuts, moved = None, {}, False
        if whole:
            last = int(ordered[-1])
        elif count < FEWEST_DOCUMENTS:
            cuts, moved = _by_position(self._first)
        else:
            wanted = max(1, round(distinct / HELD_OUT))
            last = int(ordered[np.flatnonzero(first)[wanted - 1]])
        return Split(
            num_documents=count,
            num_bytes=self._num_bytes,
            num_duplicates=count - distinct,
            digest=self._digest.hexdigest(),
            last_held_out=last,
            cuts=cuts,
            moved=moved,
        )


def _by_position(documents):
    """(cuts, moved) of a few documents, each (sha256, bytes): see `Split`."""
    sizes = dict(documents)  # in the order in which each came first
    cuts = _tail(sizes.items())
    plain = _tail([(number, size) for number, (_, size) in enumerate(documents)])
    # `plain` divides by position alone, as if no document were like another.
    moved = any(plain[i] != cuts[content] for i, (content, _) in enumerate(documents))
    return cuts, moved


def _tail(documents):
    """{name: byte where the last tenth of all the bytes begins in it} of pairs (name, bytes)."""
    documents = list(documents)
    cut = sum(size for _, size in documents) * (HELD_OUT - 1) // HELD_OUT
    cuts, before = {}, 0
    for name, size in documents:
        cuts[name] = min(max(cut - before, 0), size)
        before += size
    return cuts


def ranks(digests: np.ndarray) -> np.ndarray:
    """uint64 [n]: the first eight bytes of each sha256, uint8 [n, 32]."""
    return np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0].astype(np.uint64)


def _rank(content: bytes) -> int:
    return int.from_bytes(content[:8], "big")


def boundary(document: bytes, at: int) -> int:
    """The last place up to `at` where a UTF-8 character starts; bytes of no UTF-8 stay as cut."""
    at = min(max(at, 0), len(document))
    for back in range(min(3, at) + 1):
        if at - back == len(document) or document[at - back] & 0xC0 != 0x80:
            return at - back
    return at
