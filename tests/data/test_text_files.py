"""`text:` on files as people have them."""

import bz2
import gzip
import lzma

import numpy as np
import pytest
from PIL import Image

from qkvjax.data.dataset import prepare
from qkvjax.data.sources import open_source
from qkvjax.errors import UserError

TEXT = "Grüße aus Köln. " * 300
PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def arrow_packed(content: bytes, codec: str) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def read(source):
    return list(open_source(source).documents())


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zstd", "lz4"])
def test_compressed_text_is_the_text(tmp_path, kind):
    pack = PACKERS.get(kind, lambda content: arrow_packed(content, kind))
    file = tmp_path / "any_name"
    file.write_bytes(pack(TEXT.encode()))
    assert read(f"text:{file}") == [TEXT.encode()]
    file.write_bytes(pack(TEXT.encode()) + pack(b"and more"))  # as cat joins them
    assert read(f"text:{file}") == [TEXT.encode() + b"and more"]
    file.write_bytes(pack(np.random.default_rng(0).bytes(10**5))[:50_000])
    with pytest.raises(UserError, match="any_name is compressed .* truncated .*copy it again"):
        read(f"text:{file}")


def test_the_digest_of_a_compressed_text_is_that_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.gz").write_bytes(gzip.compress(TEXT.encode()))
    a, b = (prepare(f"text:{tmp_path}/{name}", "bytes", 8) for name in ("a.txt", "b.gz"))
    assert a.digest == b.digest


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_wide_text_becomes_utf8(tmp_path, encoding):
    file = tmp_path / "a.txt"
    file.write_text(TEXT, encoding=encoding)
    assert read(f"text:{file}") == [TEXT.encode()]
    file.write_bytes(TEXT.encode(encoding) + b"\0\xdc\0\xdc"[: 2 if encoding == "utf-16" else 3])
    with pytest.raises(UserError, match="a.txt starts as UTF-.* and is not"):
        read(f"text:{file}")


def test_a_named_file_has_to_be_text(tmp_path):
    file = tmp_path / "picture"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(file, "png")
    with pytest.raises(UserError, match="picture is a PNG image, and text: takes text"):
        open_source(f"text:{file}")
    file.write_bytes(TEXT.encode("utf-16-le"))
    with pytest.raises(UserError, match="UTF-16 text without a byte-order mark.*iconv -f UTF-16LE"):
        open_source(f"text:{file}")


def test_binary_files_among_texts_are_left_out_and_named(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(f"note {i} " * 9)
    plain = prepare(f"text:{tmp_path}", "bytes", 8)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "weights.dat").write_bytes(rng.bytes(9999))
    for source in (f"text:{tmp_path}", f"text:{tmp_path}/*"):
        lines = []
        data = prepare(source, "bytes", 8, log=lines.append)
        assert data.digest == plain.digest
        assert "2 of 14 files are left out: a.png (a PNG image), weights.dat (binary" in lines[0]
        assert any("12 files, 12 documents" in line for line in lines)
    with pytest.raises(UserError, match="none of 1 files is text .a.png .a PNG"):
        open_source(f"text:{tmp_path}/*.png")


def test_a_compressed_copy_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"two"))
    source = open_source(f"text:{tmp_path}")
    assert list(source.documents()) == [b"one", b"two"]
    assert source.left_out == ("a.txt.gz (compressed copy of a.txt)",)


def test_a_data_set_with_a_text_beside_it_is_not_read_as_that_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "README.md").write_text("a card")
    table = pyarrow.table({"text": ["some text"] * 99})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet is a parquet file.*use parquet:.*a.parquet#COL"):
        open_source(f"text:{tmp_path}")


@pytest.mark.parametrize("count", [3, 30])  # divided by position, and by content
def test_a_refusal_of_latin1_names_the_file(tmp_path, count):
    tokenizers = pytest.importorskip("tokenizers")

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.save(str(tmp_path / "tokenizer.json"))
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:02}.txt").write_text(f"Note {i}: " + "é" * 40)
    (folder / "01.txt").write_bytes(("Note: " + "é" * 40).encode("latin-1"))
    with pytest.raises(UserError, match="01.txt is not UTF-8.*tokenizer=bytes"):
        prepare(f"text:{folder}", f"bpe:{tmp_path}/tokenizer.json", 8)
    assert prepare(f"text:{folder}", "bytes", 8).num_documents == count
