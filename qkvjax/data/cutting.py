"""Divides a tokenised document at a byte, and tokenises only the text around it again.

The ids of both sides have to be those of their text alone. Far from the cut they are the ids of the
whole document. Near the cut a token may contain bytes of both sides, or depend on them, so the text
between two safe places around the cut is encoded again, each side separately.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qkvjax.data import words
from qkvjax.data.tokenizers import Tokenizer
from qkvjax.data.utf8 import character_start

_WINDOW = 1 << 16  # bytes on each side of the cut that are searched for a safe place first
_BLOCK = 1 << 20  # ids whose sizes are summed at once


@dataclasses.dataclass(frozen=True)
class DocumentCut:
    """The two sides of a document with the ids `ids`.

    Attributes:
      before, head: ids[:before] and head are the text before the cut.
      tail, after: tail and ids[after:] are the text after it.
    """

    before: int
    head: np.ndarray
    tail: np.ndarray
    after: int

    def side(self, ids: np.ndarray, held_out: bool) -> list[np.ndarray]:
        """Returns the ids of one side, in non-empty arrays that follow each other.

        Args:
          ids: of the whole document.
          held_out: the side after the cut.
        """
        arrays = (self.tail, ids[self.after :]) if held_out else (ids[: self.before], self.head)
        return [array for array in arrays if len(array)]


def cut_document(tokenizer: Tokenizer, ids: np.ndarray, position: int) -> DocumentCut:
    """Divides a document before the character that contains byte `position`.

    Args:
      ids: [n], of the document.
    """
    window = _WINDOW
    while True:
        first, first_byte = _token_at(tokenizer, ids, max(0, position - window))
        last, _ = _token_at(tokenizer, ids, position + window)
        text = tokenizer.bytes_of(ids[first:last])
        cut = character_start(text, position - first_byte)
        left, right = _safe_places(tokenizer, text, cut, first == 0, last == len(ids))
        if left is not None and right is not None:
            break
        window *= 16
    before, _ = _token_at(tokenizer, ids, first_byte + left)
    after, _ = _token_at(tokenizer, ids, first_byte + right)
    return DocumentCut(
        before=before,
        head=tokenizer.encode(text[left:cut]),
        tail=tokenizer.encode(text[cut:right]),
        after=after,
    )


def _safe_places(
    tokenizer: Tokenizer, text: bytes, cut: int, at_start: bool, at_end: bool
) -> tuple[int | None, int | None]:
    """Returns a place before and one after the cut where the text may be divided safely.

    Dividing the text there changes no ids. None: there is no such place in `text`.

    Args:
      at_start, at_end: whether `text` begins or ends where the document does.
    """
    if tokenizer.cuts == "anywhere":
        return cut, cut
    if tokenizer.cuts == "nowhere":
        return (0 if at_start else None), (len(text) if at_end else None)
    # The text begins with a token, which may begin within a character.
    start = 0 if at_start else next(i for i in range(4) if text[i] & 0xC0 != 0x80)
    left = words.safe_cut(text, start, cut)
    right = words.next_cut(text, cut)
    if left is None and at_start:
        left = 0
    if right is None and at_end:
        right = len(text)
    return left, right


def _token_at(tokenizer: Tokenizer, ids: np.ndarray, position: int) -> tuple[int, int]:
    """Returns (index of the token that contains byte `position`, its first byte).

    Beyond the end of the document these are the number of ids and the number of bytes.
    """
    first_byte = 0
    for start in range(0, len(ids), _BLOCK):
        ends = np.cumsum(tokenizer.num_bytes[ids[start : start + _BLOCK]])
        if first_byte + ends[-1] > position:
            token = int(np.searchsorted(ends, position - first_byte, side="right"))
            return start + token, first_byte + (int(ends[token - 1]) if token else 0)
        first_byte += int(ends[-1])
    return len(ids), first_byte
