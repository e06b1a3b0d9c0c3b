"""Which documents are held out, and what identifies a corpus: its content alone."""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from qkvjax.data.sources import Source
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
    """How the documents of a source are divided.

    Attributes:
      num_documents, num_bytes: of the whole source.
      digest: sha256, hexadecimal, over the sha256 of each document in order.
      last_held_out: documents whose `_rank` is at most this are validation; None splits by
        position.
    """

    source: Source
    num_documents: int
    num_bytes: int
    digest: str
    last_held_out: int | None

    def documents(self, split: str) -> Iterator[bytes]:
        """The documents of "train" or "validation", in the order of the source.

        Raises:
          UserError: at the end, if the source is not what it was when it was divided.
        """
        held_out = split == "validation"
        digest, offset = hashlib.sha256(), 0
        cut = self.num_bytes * (HELD_OUT - 1) // HELD_OUT
        for document in self.source.documents():
            content = hashlib.sha256(document).digest()
            digest.update(content)
            if self.last_held_out is None:
                at = _boundary(document, cut - offset)
                part = document[at:] if held_out else document[:at]
                if part:
                    yield part
            elif (_rank(content) <= self.last_held_out) == held_out:
                yield document
            offset += len(document)
        if digest.hexdigest() != self.digest:
            raise UserError(
                f"data.source={self.source.name!r} changed while it was read: start again when"
                " nothing writes to it"
            )


def divide(source: Source, whole: bool = False) -> Split:
    """Reads a source once and decides what is held out.

    The tenth of the documents with the smallest sha256 is validation: the choice depends on
    content alone, identical documents fall on one side, and a document keeps its side when
    others come and go, unless it is close to the limit. A source of fewer than 20 documents
    gives the last tenth of its bytes, from a UTF-8 boundary on. With `whole` all is validation.
    """
    digest, num_bytes = hashlib.sha256(), 0
    ranks = array.array("Q")  # eight bytes a document: there may be many millions
    for document in source.documents():
        content = hashlib.sha256(document).digest()
        digest.update(content)
        ranks.append(_rank(content))
        num_bytes += len(document)
    if not ranks:
        raise UserError(f"data.source={source.name!r} holds no text: all its documents are empty")
    if whole:
        last = max(ranks)
    elif len(ranks) < FEWEST_DOCUMENTS:
        last = None
    else:
        ordered = np.unique(ranks)
        last = int(ordered[max(1, round(len(ordered) / HELD_OUT)) - 1])
    return Split(source, len(ranks), num_bytes, digest.hexdigest(), last)


def _rank(content: bytes) -> int:
    return int.from_bytes(content[:8], "big")


def _boundary(document, at):
    """The last place up to `at` where a UTF-8 character starts; bytes of no UTF-8 stay as cut."""
    at = min(max(at, 0), len(document))
    for back in range(min(3, at) + 1):
        if at - back == len(document) or document[at - back] & 0xC0 != 0x80:
            return at - back
    return at
