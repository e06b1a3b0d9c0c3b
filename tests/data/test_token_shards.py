"""Which bytes of a file are ids, how wide they are, and many files as one stream."""

import numpy as np
import pytest

from qkvjax.data.dataset import prepare
from qkvjax.data.token_ids import Ids
from qkvjax.data.token_shards import open_shard
from qkvjax.data.token_widths import recognise_widths
from qkvjax.errors import UserError

SEPARATOR = 256


def stream(seed=0, documents=60, high=256):
    """Ids of documents behind separators of the tokenizer "bytes"."""
    rng = np.random.default_rng(seed)
    parts = [[SEPARATOR, *rng.integers(0, high, rng.integers(1, 60))] for _ in range(documents)]
    return np.concatenate(parts)


IDS = stream()


def with_header(path, ids, magic=20240520, version=1, dtype="<u2", count=None):
    """A shard of llm.c, or of modded-nanogpt."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())


def prepared(source, tokenizer="bytes"):
    return prepare(f"tokens:{source}", tokenizer, 8)


@pytest.fixture
def plain(tmp_path):
    IDS.astype("<u2").tofile(tmp_path / "plain.bin")
    return prepared(tmp_path / "plain.bin")


def assert_same(data, other):
    assert data.digest == other.digest
    for a, b in ((data.train, other.train), (data.validation, other.validation)):
        np.testing.assert_array_equal(a.read(range(len(a))), b.read(range(len(b))))


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "u2"), (20240801, 7, "u4")])
def test_llm_c(tmp_path, plain, magic, version, dtype):
    with_header(tmp_path / "a.bin", IDS, magic, version, dtype)
    assert_same(prepared(tmp_path / "a.bin"), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 2}, "magic 20240520 and version 2"),
        ({"version": 10**6}, "magic 20240520 and version 1000000"),
        ({"magic": 20240801}, "magic 20240801 and version 1"),
        ({"magic": 20240326, "version": 3}, "magic 20240326 and version 3"),
        ({"count": len(IDS) + 5}, "is truncated: its header says 1,911 ids"),
        ({"count": len(IDS) - 5}, "is damaged: its header says 1,901 ids"),
        ({"count": -1}, "is damaged"),
    ],
)
def test_headers_that_are_refused(tmp_path, options, message):
    with_header(tmp_path / "a.bin", IDS, **options)
    with pytest.raises(UserError, match=f"a.bin .*{message}"):
        prepared(tmp_path / "a.bin")


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4", "<u8", "<i8"])
def test_the_width_of_plain_ids_is_recognised(tmp_path, plain, dtype):
    IDS.astype(dtype).tofile(tmp_path / "a.bin")
    assert_same(prepared(tmp_path / "a.bin"), plain)


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8", ">u2"])
def test_numpy_arrays(tmp_path, plain, dtype):
    np.save(tmp_path / "a.npy", IDS.astype(dtype))
    assert_same(prepared(tmp_path / "a.npy"), plain)


@pytest.mark.parametrize(
    ("draw", "num_ids"),
    [
        (lambda rng: rng.zipf(1.2, 9999) % 50257, 50257),
        (lambda rng: rng.integers(0, 256, 9999), 257),
        (lambda rng: rng.integers(0, 65, 9999), 257),
        (lambda rng: rng.integers(0, 4, 9999), 257),
        (lambda rng: rng.integers(0, 2, 9999), 257),
        (lambda rng: rng.integers(32, 127, 40), 257),
        (lambda rng: np.full(99, 7), 257),
    ],
)
def test_widths_of_vocabularies_of_all_sizes(tmp_path, draw, num_ids):
    ids = draw(np.random.default_rng(0))
    path = tmp_path / "a.bin"
    for dtype in ("uint16", "uint32", "uint64"):
        ids.astype(dtype).tofile(path)
        (shard,) = recognise_widths([open_shard(path)], num_ids, "tokens:a")
        assert shard.dtype == dtype and shard.count == len(ids)


def test_vocabularies_of_more_than_16_bits(tmp_path):
    path = tmp_path / "a.bin"
    rng = np.random.default_rng(0)
    for high in (128_256, 50_000):  # in the second file no id is high
        rng.integers(0, high, 9999).astype("<u4").tofile(path)
        (shard,) = recognise_widths([open_shard(path)], 128_256, "tokens:a")
        assert shard.dtype == "uint32"
    rng.integers(0, 50_000, 10_000).astype("<u2").tofile(path)
    with pytest.raises(UserError, match="looks like uint16.*128,256 ids .* take 32 bits.*#uint16"):
        recognise_widths([open_shard(path)], 128_256, "tokens:a")
    assert open_shard(path, "uint16").count == 10_000
    with pytest.raises(UserError, match="holds the id 1.., and the tokenizer|holds the id"):
        rng.integers(0, 128_256, 9999).astype("<u4").tofile(path)
        prepared(path)


@pytest.mark.parametrize(
    "content", [np.zeros(500, "<u2"), np.array([5, 0], "<u2"), IDS.astype(">u4")]
)
def test_a_file_that_does_not_show_its_width_is_refused(tmp_path, content):
    content.tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match="a.bin does not tell .*#uint16 or tokens:.*a.bin#uint32"):
        prepared(tmp_path / "a.bin")


def test_a_named_type(tmp_path, plain):
    path = tmp_path / "a#1.bin"
    IDS.astype("<u4").tofile(path)
    assert_same(prepared(f"{path}#uint32"), plain)
    lines = []
    prepare(f"tokens:{path}#uint16", "bytes", 8, log=lines.append)
    assert "is read as uint16, as named, and looks like uint32" in lines[0]
    lines.clear()
    prepare(f"tokens:{path}#uint32", "bytes", 8, log=lines.append)
    assert not any("warning" in line for line in lines)
    np.zeros(500, "<u4").tofile(path)
    assert prepared(f"{path}#uint32").num_train_tokens == 448
    with pytest.raises(UserError, match="'uint23' is not a type of ids.*did you mean 'uint32'"):
        prepared(f"{path}#uint23")
    with_header(path, IDS)
    with pytest.raises(
        UserError, match="says in its header that its ids are uint16: leave #uint32"
    ):
        prepared(f"{path}#uint32")
    path.write_bytes(bytes(6))
    with pytest.raises(UserError, match="6 bytes, not a multiple of 4"):
        prepared(f"{path}#uint32")


def test_a_small_file_takes_the_width_of_the_others(tmp_path):
    paths = [tmp_path / "0.bin", tmp_path / "1.bin"]
    IDS.astype("<u4").tofile(paths[0])
    np.array([5], "<u4").tofile(paths[1])
    shards = recognise_widths([open_shard(path) for path in paths], 257, "tokens:x")
    assert [shard.count for shard in shards] == [len(IDS), 1]
    IDS.astype("<u2").tofile(paths[1])
    with pytest.raises(UserError, match=r"different widths: 0.bin \(32 bits\), 1.bin \(16 bits\)"):
        recognise_widths([open_shard(path) for path in paths], 257, "tokens:x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"\x1f\x8b\x08\0" + bytes(99), "is compressed .gzip.*decompress it"),
        ("a.bin", b"\x28\xb5\x2f\xfd" + bytes(99), "is compressed .zstd"),
        ("a.bin", b"PAR1\x15" + bytes(99), "is a parquet file.*use parquet:"),
        ("a.npz", b"PK\3\4" + bytes(99), "is a zip archive"),
        ("a.pkl", b"\x80\4" + bytes(99), "is a dump of Python objects"),
        ("a.idx", b"MMIDIDX\0\0" + bytes(99), "is the index of a Megatron"),
        ("a.jsonl", b'{"text": "one and two"}\n' * 9, "is UTF-8 text.*jsonl:"),
        ("a.npy", b"\x93NUMPY\1\0\4\0{}  ", "damaged numpy array"),
    ],
)
def test_other_formats(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} .*{message}"):
        prepared(tmp_path / name)


@pytest.mark.parametrize("first", [0x0280, 0x9D1F, 0x5A4D, 0xD8FF])
def test_ids_may_start_like_a_short_magic_number(tmp_path, first):
    np.array([first, *IDS], "<u2").tofile(tmp_path / "a.bin")
    (shard,) = recognise_widths([open_shard(tmp_path / "a.bin")], 65_000, "tokens:a")
    assert shard.count == len(IDS) + 1


@pytest.mark.parametrize("array", [IDS[:600].reshape(10, 60), IDS * 1.0, IDS[:0]])
def test_arrays_that_are_not_ids(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match="a.npy is a numpy array of .*one array .n. of uint16"):
        prepared(tmp_path / "a.npy")


def test_data_of_megatron_and_of_streaming_libraries(tmp_path):
    IDS.astype("<u2").tofile(tmp_path / "a.bin")
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\0\0")
    with pytest.raises(UserError, match="a.bin belongs to a Megatron data set: a.idx beside it"):
        prepared(tmp_path / "a.bin")
    (tmp_path / "a.idx").unlink()
    (tmp_path / "index.json").write_text('{"chunks": [{"filename": "a.bin"}]}')
    with pytest.raises(UserError, match="a.bin is a chunk of a streaming data set"):
        prepared(tmp_path / "a.bin")


def test_a_slice_crosses_files(tmp_path):
    parts = [np.arange(start, start + 10) for start in (0, 10, 20)]
    with_header(tmp_path / "0.bin", parts[0])
    parts[1].astype("<u4").tofile(tmp_path / "1.bin")
    np.save(tmp_path / "2.npy", parts[2])
    shards = [open_shard(tmp_path / "0.bin"), open_shard(tmp_path / "1.bin", "uint32")]
    ids = Ids([*shards, open_shard(tmp_path / "2.npy")])
    assert len(ids) == 30 and ids.nbytes == 10 * (2 + 4 + 8)
    for start, stop in ((0, 30), (5, 25), (10, 20), (12, 12), (29, 99), (9, 10), (7, 3)):
        assert ids[start:stop].tolist() == list(range(30))[start:stop]
    part = ids.part(8, 22)
    assert part[1:13].tolist() == list(range(9, 21)) and part.nbytes == 2 * 2 + 10 * 4 + 2 * 8
    assert part.with_ends((9, 11), 77)[:5].tolist() == [8, 77, 10, 77, 12]


def test_more_files_than_a_process_may_open(tmp_path):
    """A map keeps its file open, and a corpus may have thousands."""
    import resource

    for i in range(200):
        with_header(tmp_path / f"{i:03}.bin", np.arange(5) + 5 * i)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    ids = Ids([open_shard(path) for path in sorted(tmp_path.iterdir())])
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[1]))
    try:
        assert ids[:].sum() == sum(range(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
