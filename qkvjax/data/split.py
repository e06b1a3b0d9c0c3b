"""Which documents are held out, and the digest that identifies a corpus: by content alone.

Validation is the tenth of the documents with the smallest sha256. So the choice depends on content
alone, identical documents are in the same split, and a document stays in its split when others are
added or removed, unless its sha256 is close to the limit. A corpus of fewer than 20 documents is
split by position instead: its last tenth of bytes, from a UTF-8 boundary on, is validation. Of
identical documents the first then decides for all.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections.abc import Hashable, Iterable

import numpy as np

from qkvjax.errors import UserError

SPLITS = ("train", "validation")
HELD_OUT = 10  # one tenth is held out
# A tenth of fewer documents would be none of them, or one that is half of all text.
FEWEST_DOCUMENTS = 20


def check_split(split: str) -> None:
    """Raises UserError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise UserError(f"split={split!r} is not one of {', '.join(SPLITS)}")


@dataclasses.dataclass(frozen=True)
class Split:
    """How the documents of a corpus are divided.

    Attributes:
      num_documents, num_bytes: of the whole corpus.
      num_duplicates: documents that repeat an earlier one.
      digest: sha256, hexadecimal, over the sha256 of each document in order.
      max_held_out_rank: documents whose rank is at most this are validation; None if the corpus is
        split by position.
      cuts: of a split by position: sha256 of a document -> the byte where its held-out part begins.
        A character that contains this byte is held out as a whole, so the real cut may be up to 3
        bytes earlier.
      moved: whether duplicates changed the split by position.
    """

    num_documents: int
    num_bytes: int
    num_duplicates: int
    digest: str
    max_held_out_rank: int | None
    cuts: dict[bytes, int]
    moved: bool

    @property
    def by_position(self) -> bool:
        """Whether the bytes are split by position, instead of the documents by content."""
        return self.max_held_out_rank is None

    def held_out(self, digests: np.ndarray) -> np.ndarray:
        """Returns bool [n], which documents are validation in a split by content.

        Args:
          digests: uint8 [n, 32], the sha256 of each document.
        """
        return ranks(digests) <= self.max_held_out_rank


class Divider:
    """Gets every document in order, and then divides them; stores eight bytes for each."""

    def __init__(self):
        self._digest = hashlib.sha256()
        self._ranks = array.array("Q")
        self._first: list[tuple[bytes, int]] = []
        self._num_bytes = 0

    def add(self, digest: bytes, num_bytes: int) -> None:
        """Counts a document.

        Args:
          digest: its sha256.
          num_bytes: its size.
        """
        self._digest.update(digest)
        self._ranks.append(_rank(digest))
        self._num_bytes += num_bytes
        if len(self._first) < FEWEST_DOCUMENTS:
            self._first.append((digest, num_bytes))

    def divide(self, name: str, whole: bool = False) -> Split:
        """Returns the split of all documents.

        Args:
          name: `data.source`, for messages.
          whole: all documents are validation.

        Raises:
          UserError: there are no documents.
        """
        count = len(self._ranks)
        if not count:
            raise UserError(f"data.source={name!r} holds no text: all its documents are empty")
        ordered = np.frombuffer(self._ranks, np.uint64)
        ordered.sort()  # in place, because there may be hundreds of millions
        is_first = np.ones(count, bool)  # of equal ranks
        np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
        num_distinct = int(np.count_nonzero(is_first))
        max_rank = None
        cuts = {}
        moved = False
        if whole:
            max_rank = int(ordered[-1])
        elif count < FEWEST_DOCUMENTS:
            cuts, moved = _by_position(self._first)
        else:
            num_held_out = max(1, round(num_distinct / HELD_OUT))
            max_rank = int(ordered[np.flatnonzero(is_first)[num_held_out - 1]])
        return Split(
            num_documents=count,
            num_bytes=self._num_bytes,
            num_duplicates=count - num_distinct,
            digest=self._digest.hexdigest(),
            max_held_out_rank=max_rank,
            cuts=cuts,
            moved=moved,
        )


def ranks(digests: np.ndarray) -> np.ndarray:
    """Returns uint64 [n]: the first eight bytes of each sha256, uint8 [n, 32]."""
    return np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0].astype(np.uint64)


def _rank(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


def _by_position(documents: list[tuple[bytes, int]]) -> tuple[dict[bytes, int], bool]:
    """Returns (cuts, moved) of a few documents, each (sha256, bytes): see `Split`."""
    sizes = dict(documents)  # of distinct documents, in the order of their first occurrence
    cuts = _cuts(sizes.items())
    # The cuts of all documents, as if none repeated another.
    cuts_with_copies = _cuts((number, size) for number, (_, size) in enumerate(documents))
    moved = any(
        cuts_with_copies[number] != cuts[digest] for number, (digest, _) in enumerate(documents)
    )
    return cuts, moved


def _cuts(documents: Iterable[tuple[Hashable, int]]) -> dict[Hashable, int]:
    """Returns key -> the byte where the last tenth of all bytes begins in a document.

    Args:
      documents: (key, bytes) of each. The result is 0 for documents that lie in the last tenth, and
        their size for those that lie before it.
    """
    documents = list(documents)
    cut = sum(size for _, size in documents) * (HELD_OUT - 1) // HELD_OUT
    cuts = {}
    start = 0
    for key, size in documents:
        cuts[key] = min(max(cut - start, 0), size)
        start += size
    return cuts
