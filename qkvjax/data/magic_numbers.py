"""How files of known formats start, and what to do with such a file where text is wanted."""

from __future__ import annotations

# Remedies.
_UNPACK = "unpack it and name the folder"
_IMAGE = "leave it out; labelled images for a ViT are npz:FILE or idx:FOLDER"
_DOCUMENT = "save its text as UTF-8"
_ROWS = "save the column with the text as jsonl or parquet"
_PARQUET = "use parquet:PATH#COLUMN"
_ARROW = "use arrow:PATH#COLUMN"
TOKENS = "if it holds token ids, use tokens:PATH"
_ARRAYS = "token ids are tokens:PATH, labelled images npz:FILE"
CONVERT = "convert it to UTF-8 text"
_WEIGHTS = "it holds a model's weights: name files of text"
_PROGRAM = "name files of text"
_OBJECTS = "it can run code when it is opened, so it is never opened: save the texts as jsonl"

# (how files start, a regular expression; name; remedy if text is wanted). Texts may start with the
# same letters, so where a magic number is letters alone, the next byte must not occur in text.
MAGIC = (
    (rb"\x89PNG\r\n\x1a\n", "a PNG image", _IMAGE),
    (rb"GIF8[79]a", "a GIF image", _IMAGE),
    (rb"RIFF....WEBP", "a WebP image", _IMAGE),
    (rb"II\*\0|MM\0\*", "a TIFF image", _IMAGE),
    (rb"BM....\0\0\0\0", "a BMP image", _IMAGE),
    (rb"8BPS\0", "a Photoshop image", _IMAGE),
    (rb"....ftyp(heic|heix|mif1|avif)", "an HEIF or AVIF image", _IMAGE),
    (rb"....ftyp", "an MP4 or QuickTime video", CONVERT),
    (rb"RIFF....(WAVE|AVI )", "a WAV or AVI recording", CONVERT),
    (rb"ID3[\x02-\x04]", "an MP3 recording", CONVERT),
    (rb"OggS\0|fLaC[\0\x80]|\.snd\0\0|FORM....AIF", "a sound recording", CONVERT),
    (rb"\x1aE\xdf\xa3", "a Matroska or WebM video", CONVERT),
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
# These are so short that a file of numbers may start with them by chance.
SHORT_MAGIC = (
    (rb"\xff\xd8\xff", "a JPEG image", _IMAGE),
    (rb"\0\0[\x01\x02]\0[\x01-\xff]\0", "an icon", _IMAGE),
    (rb"\xff[\xfb\xf3\xf2][\x10-\xef]", "an MP3 recording", CONVERT),
    (rb"\x80[\x02-\x05]", "a dump of Python objects", _OBJECTS),
    (rb"\x1f[\x9d\xa0]", "a file of compress (.Z)", _UNPACK),
    (rb"MZ.{0,62}\0", "a Windows program or library", _PROGRAM),
    (rb"..\r\n[\0-\x03]\0\0\0", "compiled Python (.pyc)", _PROGRAM),
    (rb"\0\x01\0\0\0", "a font", _PROGRAM),
)
