"""Formats are recognised by the first bytes of a file."""

import io
import json
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from qkvjax.data.formats import format_of, identify
from qkvjax.data.token_shards import open_shard
from qkvjax.errors import UserError

RNG = np.random.default_rng(0)
TEXT = "Grüße, naïve café – " * 200


def image(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def saved(write, *args) -> bytes:
    file = io.BytesIO()
    write(file, *args)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return file.getvalue()


def safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(36)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        *((image(kind), kind) for kind in ("PNG", "JPEG", "GIF", "WebP", "TIFF", "BMP", "PDF")),
        (zipped(), "zip"),
        (tarred(), "tar"),
        (saved(np.save, np.arange(9)), "numpy"),
        (saved(np.savez, np.arange(9)), "zip"),
        (safetensors(), "safetensors"),
        (b"GGUF\3\0\0\0" + bytes(40), "GGUF"),
        (b"\x7fELF\2\1\1" + bytes(40), "ELF"),
        (b"SQLite format 3\0" + bytes(40), "SQLite"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
        (b"PAR1\x15\x04" + bytes(40), "parquet"),
        (b"ARROW1\0\0" + bytes(40), "Arrow file"),
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}.", "Python objects"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "Git LFS"),
        (struct.pack("<3i", 20240520, 1, 9) + bytes(1012), "token ids"),
        (RNG.integers(0, 256, 9999, dtype=np.uint8).tobytes(), "binary"),
        (RNG.normal(size=999).astype("<f4").tobytes(), "binary"),
        ((RNG.zipf(1.3, 5000) % 50257).astype("<u2").tobytes(), "binary"),
        (RNG.integers(97, 123, 999).astype("<u4").tobytes(), "UTF-32 text without"),
        (TEXT.encode("utf-16-le"), "UTF-16 text without"),
        (TEXT.encode("utf-16-be"), "UTF-16 text without"),
    ],
)
def test_formats_that_are_not_text(content, name):
    form = identify(content)
    assert not form.is_text and name in form.name and form.remedy


@pytest.mark.parametrize(
    ("content", "name", "encoding"),
    [
        (b"", "UTF-8", ""),
        (TEXT.encode(), "UTF-8", ""),
        (TEXT.encode("utf-8-sig"), "UTF-8", ""),
        (b"a" + "é".encode() * 40_000, "UTF-8", ""),  # the end of the sample cuts a character
        (TEXT.encode("utf-16"), "UTF-16", "utf-16"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "UTF-16", "utf-16"),
        (TEXT.encode("utf-32"), "UTF-32", "utf-32"),
        ("Grüße".encode("latin-1") * 99, "another encoding", ""),
        ("Привет, мир. ".encode("koi8-r") * 99, "another encoding", ""),
        ("日本語の文章。".encode("shift-jis") * 99, "another encoding", ""),
        ("中文文本。".encode("gbk") * 99, "another encoding", ""),
        (b"\x1b[31mred\x1b[0m\r\n\tline\x0c" * 9, "UTF-8", ""),
        # texts that begin as files of other formats do
        (b"PARENTS and others, ORCHESTRA", "UTF-8", ""),
        (b"GGUF is a format of files", "UTF-8", ""),
        (b"MZ is how a program starts", "UTF-8", ""),
        (b"BM25 ranks documents; BZh9 is how bzip2 starts", "UTF-8", ""),
    ],
)
def test_text_of_many_encodings(content, name, encoding):
    form = identify(content)
    assert form.is_text and name in form.name and form.encoding == encoding


def test_a_compressed_file_is_what_is_in_it(tmp_path):
    import bz2
    import gzip
    import lzma

    file = tmp_path / "file"
    for pack in (gzip.compress, bz2.compress, lzma.compress):
        file.write_bytes(pack(TEXT.encode()))
        assert format_of(file).name == "UTF-8 text"
        file.write_bytes(pack(tarred()))
        assert "tar" in format_of(file).name
        file.write_bytes(pack(pack(TEXT.encode())))
        assert "compressed twice" in format_of(file).name


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    for open_file in (format_of, open_shard):
        with pytest.raises(UserError, match="a.bin cannot be read .No such file"):
            open_file(path)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    for open_file in (format_of, open_shard):
        with pytest.raises(UserError, match="a.bin cannot be read .Permission denied"):
            open_file(path)
