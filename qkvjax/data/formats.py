"""What a file is, by its first bytes: looked at before anything is read.

A name says little: text comes as `.gz`, as UTF-16 or among pictures, and everything that is not
text would train a byte-level model as well as text does.
"""

from __future__ import annotations

import codecs
import dataclasses
import re
import struct
from pathlib import Path

from qkvjax.data.compression import compression_of, opened
from qkvjax.errors import UserError

TOKEN_MAGICS = (20240520, 20240801)  # of llm.c's files of ids
HEAD = 1 << 16  # bytes that are looked at
# Bytes that text does not hold, whatever its encoding (tab, line ends, backspace, form feed and
# escape are in texts). One in ten bytes of compressed or numeric data is among them.
_CONTROL = bytes(i for i in range(32) if i not in b"\t\n\r\b\f\x1b") + b"\x7f"
_MOST_CONTROL = 0.02
_MOST_NUL = 0.001

_UNPACK = "unpack it and name the folder"
_IMAGE = "leave it out; labelled images for a ViT are npz:FILE or idx:FOLDER"
_DOCUMENT = "save its text as UTF-8"
_ROWS = "save the column with the text as jsonl or parquet"
_PARQUET = "use parquet:PATH#COLUMN"
_ARROW = "use arrow:PATH#COLUMN"
_TOKENS = "if it holds token ids, use tokens:PATH"
_ARRAYS = "token ids are tokens:PATH, labelled images npz:FILE"
_CONVERT = "convert it to UTF-8 text"
_WEIGHTS = "it holds a model's weights: name files of text"
_PROGRAM = "name files of text"
_OBJECTS = "it can run code when it is opened, so it never is: save the texts as jsonl"

# How files start, as regular expressions: (start, name, remedy where text is wanted). Where letters
# alone would do, the byte behind them must be one that text does not hold.
_MAGIC = (
    (rb"\x89PNG\r\n\x1a\n", "a PNG image", _IMAGE),
    (rb"GIF8[79]a", "a GIF image", _IMAGE),
    (rb"RIFF....WEBP", "a WebP image", _IMAGE),
    (rb"II\*\0|MM\0\*", "a TIFF image", _IMAGE),
    (rb"BM....\0\0\0\0", "a BMP image", _IMAGE),
    (rb"8BPS\0", "a Photoshop image", _IMAGE),
    (rb"....ftyp(heic|heix|mif1|avif)", "an HEIF or AVIF image", _IMAGE),
    (rb"....ftyp", "an MP4 or QuickTime film", _CONVERT),
    (rb"RIFF....(WAVE|AVI )", "a WAV or AVI recording", _CONVERT),
    (rb"ID3[\x02-\x04]", "an MP3 recording", _CONVERT),
    (rb"OggS\0|fLaC[\0\x80]|\.snd\0\0|FORM....AIF", "a sound recording", _CONVERT),
    (rb"\x1aE\xdf\xa3", "a Matroska or WebM film", _CONVERT),
    (rb"%PDF-", "a PDF document", f"{_DOCUMENT}, with pdftotext for example"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", _DOCUMENT),
    (rb"AT&TFORM", "a DjVu document", _DOCUMENT),
    (
        rb"PK(\x03\x04|\x05\x06|\x07\x08)",
        "a zip archive (docx, xlsx, epub and npz are such)",
        _UNPACK,
    ),
    (rb".{257}ustar(\0|  \0)", "a tar archive", _UNPACK),
    (rb"7z\xbc\xaf'\x1c", "a 7-Zip archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (rb"!<arch>\n", "an ar archive", _UNPACK),
    (rb"\xff\x06\0\0sNaPpY", "a Snappy stream", _UNPACK),
    (rb"PAR[1E]([\0-\x08\x0e-\x1f]|$)", "a parquet file", _PARQUET),
    (rb"ARROW1\0\0", "an Arrow file", _ARROW),
    (rb"\xff\xff\xff\xff..[\0-\x0f]\0[\x04-\x40]\0\0\0", "an Arrow stream", _ARROW),
    (rb"FEA1\0\0", "an old Feather file", _ROWS),
    (rb"ORC[\0-\x08\x0e-\x1f]", "an ORC file", _ROWS),
    (rb"Obj\x01", "an Avro file", _ROWS),
    (rb"SQLite format 3\0", "an SQLite database", _ROWS),
    (rb".{8}DUCK[\0-\x08\x40]", "a DuckDB database", _ROWS),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", _ROWS),
    (rb"CDF[\x01\x02\x05]", "a NetCDF file", _ROWS),
    (rb"MATLAB 5\.0 MAT-file", "a MATLAB file", _ROWS),
    (rb"\x93NUMPY", "a numpy array (.npy)", _ARRAYS),
    (rb"MMIDIDX\0\0|TNTIDX\0\0", "the index of a Megatron data set", _ROWS),
    (rb"GGUF([\x01-\x08]\0\0\0|\0\0\0[\x01-\x08])", "a GGUF model", _WEIGHTS),
    (rb"...[\0-\x05]\0\0\0\0\{", "a safetensors file", _WEIGHTS),
    (rb"\x7fELF", "an ELF program or library", _PROGRAM),
    (rb"[\xcf\xce]\xfa\xed\xfe|\xca\xfe\xba\xbe\0", "a compiled program", _PROGRAM),
    (rb"\0asm", "a WebAssembly program", _PROGRAM),
    (rb"wOF[F2]\0|OTTO\0|ttcf\0", "a font", _PROGRAM),
    (
        rb"version https://git-lfs",
        "a pointer of Git LFS in place of the file",
        "fetch the file with git lfs pull",
    ),
)
# So short that numbers may start with them by chance.
_SHORT_MAGIC = (
    (rb"\xff\xd8\xff", "a JPEG image", _IMAGE),
    (rb"\0\0[\x01\x02]\0[\x01-\xff]\0", "an icon", _IMAGE),
    (rb"\xff[\xfb\xf3\xf2][\x10-\xef]", "an MP3 recording", _CONVERT),
    (rb"\x80[\x02-\x05]", "a dump of Python objects", _OBJECTS),
    (rb"\x1f[\x9d\xa0]", "a file of compress (.Z)", _UNPACK),
    (rb"MZ.{0,62}\0", "a Windows program or library", _PROGRAM),
    (rb"..\r\n[\0-\x03]\0\0\0", "compiled Python (.pyc)", _PROGRAM),
    (rb"\0\x01\0\0\0", "a font", _PROGRAM),
)
_BOMS = (
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
      encoding: to decode by, "utf-16" or "utf-32"; "" leaves the bytes as they are.
      remedy: what to do where text is wanted.
      evidence: "magic" number; "short magic", which numbers may start with by chance; "content".
    """

    name: str
    is_text: bool = False
    encoding: str = ""
    remedy: str = _CONVERT
    evidence: str = "content"


def head_of(path: Path) -> bytes:
    """Reads the first bytes of what a file holds, decompressed."""
    with opened(path) as file:
        return file.read(HEAD)


def look(path: Path) -> Format:
    """Says what a file holds; of a compressed one, what is inside.

    Raises:
      UserError: a compressed file is damaged.
    """
    return identify(head_of(path))


def identify(head: bytes) -> Format:
    """Says what starts with these bytes."""
    if packed := compression_of(head):  # the outer compression is undone already
        return Format(f"compressed twice ({packed})", remedy="decompress it once", evidence="magic")
    for start, name, remedy in _MAGIC:
        if re.match(start, head, re.DOTALL):
            return Format(name, remedy=remedy, evidence="magic")
    if header := token_header(head):
        name = f"a shard of token ids (llm.c, version {header[1]})"
        return Format(name, remedy="use tokens:PATH", evidence="magic")
    for start, name, remedy in _SHORT_MAGIC:
        if re.match(start, head, re.DOTALL):
            return Format(name, remedy=remedy, evidence="short magic")
    for mark, encoding in _BOMS:
        if head.startswith(mark) and _share_of_noise(head, encoding) < _MOST_CONTROL:
            return Format(f"{encoding.upper()} text", True, encoding)
    if encoding := _wide_text(head):
        name = encoding.upper().removesuffix("LE").removesuffix("BE").rstrip("-")
        return Format(
            f"{name} text without a byte-order mark",
            remedy=f"convert it: iconv -f {encoding.upper()} -t UTF-8",
        )
    sample = max(1, len(head))
    num_control = len(head) - len(head.translate(None, delete=_CONTROL))
    if head.count(0) / sample > _MOST_NUL or num_control / sample > _MOST_CONTROL:
        return Format("binary data of no known kind", remedy=f"{_CONVERT}; {_TOKENS}")
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(head, final=len(head) < HEAD)
    except UnicodeDecodeError:
        return Format("text of another encoding than UTF-8", True)
    return Format("UTF-8 text", True)


def refusal(path: Path, found: Format, wanted: str) -> UserError:
    """Returns what is said of a file of another format.

    Args:
      wanted: what the source takes, as "text: takes UTF-8 text".
    """
    remedy = found.remedy.replace("PATH", str(path))
    return UserError(f"{path} is {found.name}, and {wanted}; {remedy}")


def require_text(path: Path, wanted: str) -> Format:
    """Looks at a file that has to be text.

    Raises:
      UserError: it is something else, or damaged.
    """
    found = look(path)
    if not found.is_text:
        raise refusal(path, found, wanted)
    return found


def token_header(head: bytes) -> tuple[int, int, int] | None:
    """Returns (magic, version, number of ids) of llm.c's header, which is 256 int32.

    Its magics are dates, 20240520 and others.
    """
    if len(head) < 12:
        return None
    magic, version, count = struct.unpack("<3i", head[:12])
    year, month, day = magic // 10000, magic // 100 % 100, magic % 100
    is_date = 2023 <= year <= 2039 and 1 <= month <= 12 and 1 <= day <= 31
    is_header = magic in TOKEN_MAGICS or (is_date and 0 <= version < 1000)
    return (magic, version, count) if is_header else None


def _wide_text(head: bytes) -> str:
    """Returns "utf-16le", ... where every second byte, or three of four, are zero; else ""."""
    even = head[: len(head) // 4 * 4]
    if len(even) < 8:
        return ""
    quarter = len(even) // 4
    zeros = [even[i::4].count(0) / quarter for i in range(4)]
    high = tuple(share > 0.4 for share in zeros)
    encoding = {
        (False, True, False, True): "utf-16le",
        (True, False, True, False): "utf-16be",
        (False, True, True, True): "utf-32le",
        (True, True, True, False): "utf-32be",
    }.get(high, "")
    if not encoding:
        return ""
    # Numbers of 16 and 32 bits have zeros there too; few of them are letters throughout.
    text = even.decode(encoding, errors="replace")
    letters = sum(c.isalpha() or c.isspace() for c in text) / len(text)
    return encoding if letters > 0.6 and _share_of_noise(even, encoding) < 0.01 else ""


def _share_of_noise(head: bytes, encoding: str) -> float:
    """Returns the share of characters that no text of this encoding holds."""
    text = head[: len(head) // 4 * 4].decode(encoding, errors="replace")
    good = sum(c != "\ufffd" and (c.isprintable() or c.isspace() or c == "\ufeff") for c in text)
    return 1 - good / max(1, len(text))
