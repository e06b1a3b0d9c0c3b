"""Where UTF-8 characters begin."""

from __future__ import annotations


def character_start(text: bytes, position: int) -> int:
    """Returns the start of the character that contains byte `position`.

    The end of the text is a start too. A position that is outside the text is moved to its nearest
    end, and one within bytes that are not UTF-8 is returned as it is.
    """
    position = min(max(position, 0), len(text))
    for back in range(min(3, position) + 1):  # a character has at most four bytes
        start = position - back
        is_continuation = start < len(text) and text[start] & 0xC0 == 0x80
        if not is_continuation:
            return start
    return position
