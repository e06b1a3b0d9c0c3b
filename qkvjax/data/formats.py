"""Recognises what a file holds by its first bytes, before anything is read.

Names do not tell enough: text comes as `.gz`, as UTF-16 or in a folder of pictures. A byte-level
model would train on any bytes without an error, so files that are not text have to be refused here.
"""

from __future__ import annotations

import codecs
import dataclasses
import re
import struct
from pathlib import Path

from qkvjax.data.compression import compression_of, opened
from qkvjax.data.magic_numbers import CONVERT, MAGIC, SHORT_MAGIC, TOKENS
from qkvjax.errors import UserError

TOKEN_MAGICS = (20240520, 20240801)  # of llm.c's files of ids
HEAD = 1 << 16  # bytes that are checked
# Bytes that do not occur in text of any encoding; tab, line ends, backspace, form feed and escape
# do. About one in ten bytes of compressed or numeric data is one of them.
_CONTROL = bytes(i for i in range(32) if i not in b"\t\n\r\b\f\x1b") + b"\x7f"
_MAX_CONTROL = 0.02
_MAX_ZERO = 0.001
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclasses.dataclass(frozen=True)
class Format:
    """What a file holds.

    Attributes:
      name: for messages: "UTF-8 text", "a PNG image", ...
      is_text: whether it can be read as text.
      encoding: "utf-16" or "utf-32", to decode it; "" leaves the bytes as they are.
      remedy: what to do if text is wanted.
      evidence: "magic" number; "short magic", which numbers may start with by chance; "content".
    """

    name: str
    is_text: bool = False
    encoding: str = ""
    remedy: str = CONVERT
    evidence: str = "content"


def read_head(path: Path) -> bytes:
    """Reads the first bytes of what a file holds, decompressed."""
    with opened(path) as file:
        return file.read(HEAD)


def format_of(path: Path) -> Format:
    """Returns what a file holds; of a compressed file, what is inside.

    Raises:
      UserError: a compressed file is damaged.
    """
    return identify(read_head(path))


def identify(head: bytes) -> Format:
    """Returns the format of a file that starts with these bytes."""
    # The outer compression is undone already.
    if compression := compression_of(head):
        name = f"compressed twice ({compression})"
        return Format(name, remedy="decompress it once", evidence="magic")
    return _by_magic(head) or _wide_text(head) or _by_share_of_bytes(head)


def wrong_format(path: Path, content: Format, wanted: str) -> UserError:
    """Returns the error about a file of another format.

    Args:
      wanted: what the source takes, as "text: takes UTF-8 text".
    """
    remedy = content.remedy.replace("PATH", str(path))
    return UserError(f"{path} is {content.name}, and {wanted}; {remedy}")


def require_text(path: Path, wanted: str) -> Format:
    """Returns the format of a file that has to be text.

    Raises:
      UserError: it is something else, or damaged.
    """
    content = format_of(path)
    if not content.is_text:
        raise wrong_format(path, content, wanted)
    return content


def token_header(head: bytes) -> tuple[int, int, int] | None:
    """Returns (magic, version, number of ids) of llm.c's header, which is 256 int32; else None.

    Its magic numbers are dates, 20240520 and others. Dates of unknown versions are returned too.
    """
    if len(head) < 12:
        return None
    magic, version, count = struct.unpack("<3i", head[:12])
    year, month, day = magic // 10000, magic // 100 % 100, magic % 100
    is_date = 2023 <= year <= 2039 and 1 <= month <= 12 and 1 <= day <= 31
    is_header = magic in TOKEN_MAGICS or (is_date and 0 <= version < 1000)
    return (magic, version, count) if is_header else None


def _by_magic(head: bytes) -> Format | None:
    """Returns the format whose magic number these bytes start with."""
    for start, name, remedy in MAGIC:
        if re.match(start, head, re.DOTALL):
            return Format(name, remedy=remedy, evidence="magic")
    if header := token_header(head):
        name = f"a shard of token ids (llm.c, version {header[1]})"
        return Format(name, remedy="use tokens:PATH", evidence="magic")
    for start, name, remedy in SHORT_MAGIC:
        if re.match(start, head, re.DOTALL):
            return Format(name, remedy=remedy, evidence="short magic")
    return None


def _wide_text(head: bytes) -> Format | None:
    """Returns the format of text in UTF-16 or UTF-32, with or without a byte-order mark."""
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark) and _share_of_noise(head, encoding) < _MAX_CONTROL:
            return Format(f"{encoding.upper()} text", is_text=True, encoding=encoding)
    encoding = _unmarked_encoding(head)
    if not encoding:
        return None
    name = encoding.upper().removesuffix("LE").removesuffix("BE").rstrip("-")
    return Format(
        f"{name} text without a byte-order mark",
        remedy=f"convert it: iconv -f {encoding.upper()} -t UTF-8",
    )


def _by_share_of_bytes(head: bytes) -> Format:
    """Returns "binary data" where zeros or control characters are many, else text."""
    length = max(1, len(head))
    num_control = len(head) - len(head.translate(None, delete=_CONTROL))
    if head.count(0) / length > _MAX_ZERO or num_control / length > _MAX_CONTROL:
        return Format("binary data of no known kind", remedy=f"{CONVERT}; {TOKENS}")
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_whole_file = len(head) < HEAD  # a longer file may be cut within a character
    try:
        decoder.decode(head, final=is_whole_file)
    except UnicodeDecodeError:
        return Format("text of another encoding than UTF-8", is_text=True)
    return Format("UTF-8 text", is_text=True)


def _unmarked_encoding(head: bytes) -> str:
    """Returns "utf-16le", ... if every second byte, or three of four, are mostly zero; else ""."""
    sample = head[: len(head) // 4 * 4]
    if len(sample) < 8:
        return ""
    quarter = len(sample) // 4
    is_zero = tuple(sample[i::4].count(0) / quarter > 0.4 for i in range(4))
    encoding = {
        (False, True, False, True): "utf-16le",
        (True, False, True, False): "utf-16be",
        (False, True, True, True): "utf-32le",
        (True, True, True, False): "utf-32be",
    }.get(is_zero, "")
    if not encoding:
        return ""
    # Numbers of 16 and 32 bits have zeros at these positions too. Few of them decode to letters.
    text = sample.decode(encoding, errors="replace")
    letters = sum(c.isalpha() or c.isspace() for c in text) / len(text)
    return encoding if letters > 0.6 and _share_of_noise(sample, encoding) < 0.01 else ""


def _share_of_noise(head: bytes, encoding: str) -> float:
    """Returns the share of characters that do not occur in text of this encoding."""
    text = head[: len(head) // 4 * 4].decode(encoding, errors="replace")
    good = sum(c != "\ufffd" and (c.isprintable() or c.isspace() or c == "\ufeff") for c in text)
    return 1 - good / max(1, len(text))
