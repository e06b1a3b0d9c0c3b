"""Preparing large corpora: one pass, several processes, resuming, progress and warnings."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from qkvjax import progress
from qkvjax.data import builder, encoding, parts, sources
from qkvjax.data import prepare as preparing
from qkvjax.data.dataset import prepare
from qkvjax.data.encoding import UnencodablePiece, encode_batches
from qkvjax.data.tokenizers import load_tokenizer
from qkvjax.errors import UserError


def rows_of(data):
    return [split.read(range(len(split))) for split in (data.train, data.validation)]


def assert_same(one, two):
    assert one.digest == two.digest
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def lines(tmp_path):
    """A jsonl file of 400 documents."""
    rng = random.Random(0)
    words = "the cat and the dog naïve of an éclair".split()
    path = tmp_path / "lines.jsonl"
    with open(path, "w") as file:
        for i in range(400):
            text = f"{i} " + " ".join(rng.choices(words, k=rng.randrange(5, 200)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture
def reads(monkeypatch):
    """Returns a list that gets the length of each document that a source reads."""
    counted = []
    documents = sources.Source.documents

    def counting(self):
        for document in documents(self):
            counted.append(len(document))
            yield document

    monkeypatch.setattr(sources.Source, "documents", counting)
    return counted


def test_a_corpus_is_read_once(lines, reads):
    prepare(f"jsonl:{lines}", "bytes", 32)
    assert len(reads) == 400


def test_shards_and_parts_make_no_difference(lines, bpe, monkeypatch, data_folder):
    name = f"bpe:{bpe}"
    whole = prepare(f"jsonl:{lines}", name, 32)
    expected = rows_of(whole)
    (folder,) = data_folder.glob("jsonl-*")
    folder.rename(data_folder / "other")
    monkeypatch.setattr(parts, "PART_BYTES", 3000)
    monkeypatch.setattr(preparing, "_BATCH_BYTES", 500)
    monkeypatch.setattr(builder, "_SHARD_BYTES", 3 * 32 * 33 * 2)
    cut = prepare(f"jsonl:{lines}", name, 32)
    assert cut.digest == whole.digest
    for a, b in zip(rows_of(cut), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(list(data_folder.glob("jsonl-*/packed_tokens/*/*train*"))) > 3
    assert not list(data_folder.glob("jsonl-*/work"))


STOPPED = """
    import os, signal, sys
    from qkvjax.data import encoding, parts, prepare as preparing, builder
    from qkvjax.data.dataset import prepare
    parts.PART_BYTES, preparing._BATCH_BYTES = 3000, 500
    builder._SHARD_BYTES = 3 * 32 * 33 * 2
    {disturbance}
    prepare("jsonl:{lines}", "bytes", 32, log=print)
"""
WHILE_TOKENISING = """
    finish = parts.Parts.finish
    def finishing(self):
        finish(self)
        if len(self) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    parts.Parts.finish = finishing
"""
WHILE_PACKING = """
    class Writer(builder.ArrayRecordWriter):
        def close(self):
            super().close()
            made.append(self)
            if len(made) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
    made = []
    builder.ArrayRecordWriter = Writer
"""
BEFORE_THE_END = """
    def killed(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)
    preparing.shutil.rmtree = killed
"""


def run(code, data_folder, **options):
    environment = os.environ | {
        "QKVJAX_DATA_DIR": str(data_folder),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("disturbance", [WHILE_TOKENISING, WHILE_PACKING, BEFORE_THE_END])
def test_a_killed_preparation_is_resumed(lines, data_folder, monkeypatch, disturbance):
    code = STOPPED.replace("{disturbance}", disturbance).replace("{lines}", str(lines))
    killed = run(textwrap.dedent(code), data_folder)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (partial,) = data_folder.glob(".jsonl-*.partial")
    finished = {f: f.stat().st_mtime_ns for f in partial.rglob("*.array_record-*")}

    tokenised = []
    encode_piece = encoding.Tokenizer.encode_piece
    monkeypatch.setattr(
        encoding.Tokenizer,
        "encode_piece",
        lambda self, piece: tokenised.append(len(piece)) or encode_piece(self, piece),
    )
    monkeypatch.setattr(parts, "PART_BYTES", 3000)
    monkeypatch.setattr(preparing, "_BATCH_BYTES", 500)
    monkeypatch.setattr(builder, "_SHARD_BYTES", 3 * 32 * 33 * 2)
    logged = []
    went_on = prepare(f"jsonl:{lines}", "bytes", 32, log=logged.append)
    total = sum(len(json.loads(line)["text"].encode()) for line in open(lines))
    if disturbance == WHILE_TOKENISING:
        assert total - 5 * 4500 < sum(tokenised) <= total - 5 * 3000
        assert any("going on after 5 parts" in line for line in logged)
    else:
        assert not tokenised
    (folder,) = data_folder.glob("jsonl-*")
    for file, time_of in finished.items():
        assert (folder / file.relative_to(partial)).stat().st_mtime_ns == time_of
    assert len(finished) >= {WHILE_TOKENISING: 0, WHILE_PACKING: 2, BEFORE_THE_END: 4}[disturbance]
    assert not partial.exists() and not (folder / "work").exists()

    expected = rows_of(went_on)
    folder.rename(data_folder / "other")
    straight = prepare(f"jsonl:{lines}", "bytes", 32)
    assert straight.digest == went_on.digest
    for a, b in zip(rows_of(straight), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_corpus_that_changed_after_a_kill_is_refused(lines, data_folder):
    code = STOPPED.replace("{disturbance}", WHILE_TOKENISING).replace("{lines}", str(lines))
    run(textwrap.dedent(code), data_folder)
    stat = lines.stat()
    lines.write_bytes(lines.read_bytes().replace(b"cat", b"cow"))
    os.utime(lines, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # so that it looks the same
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(f"jsonl:{lines}", "bytes", 32)
    prepare(f"jsonl:{lines}", "bytes", 32)  # the remains are gone


def test_a_source_that_changes_while_it_is_read(corpus, monkeypatch):
    documents = sources.Source.documents

    def changing(self):
        yield from documents(self)
        (corpus / "00.txt").write_text("changed")

    monkeypatch.setattr(sources.Source, "documents", changing)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(f"text:{corpus}", "bytes", 16)


class Batch:
    def __init__(self, *pieces):
        self.pieces = list(pieces)


def test_other_processes_give_the_same_ids_in_the_same_order(bpe, monkeypatch):
    monkeypatch.setattr(encoding, "_ALONE_BYTES", 1)
    tokenizer = load_tokenizer(f"bpe:{bpe}")
    batches = [Batch(*(f"the cat {i} and {j}".encode() for j in range(i % 4))) for i in range(40)]
    encoded = list(encode_batches(tokenizer, batches, np.uint16, num_workers=3))
    assert [batch for batch, _ in encoded] == batches
    for batch, ids in encoded:
        expected = [tokenizer.encode(piece).tolist() for piece in batch.pieces]
        assert [i.tolist() for i in ids] == expected
        assert all(i.dtype == np.uint16 for i in ids)


def test_other_processes_refuse_and_end(bpe, monkeypatch):
    monkeypatch.setattr(encoding, "_ALONE_BYTES", 1)
    started = []
    popen = subprocess.Popen

    def watched(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(encoding.subprocess, "Popen", watched)
    tokenizer = load_tokenizer(f"bpe:{bpe}")
    batches = [Batch(b"the cat")] * 3 + [Batch(b"the", b"ab\xff")] + [Batch(b"the cat")] * 20
    with pytest.raises(UnencodablePiece) as error:
        list(encode_batches(tokenizer, batches, np.uint16, num_workers=2))
    assert (error.value.batch, error.value.piece) == (batches[3], 1)
    assert (error.value.error.reason, error.value.error.position) == ("invalid start byte", 2)
    assert started and all(process.poll() is not None for process in started)


def test_a_process_that_is_killed_is_named_and_the_parts_stay(lines, bpe, data_folder, monkeypatch):
    monkeypatch.setattr(encoding, "_ALONE_BYTES", 20_000)
    monkeypatch.setattr(encoding, "_num_cores", lambda: 2)
    monkeypatch.setattr(parts, "PART_BYTES", 3000)
    monkeypatch.setattr(preparing, "_BATCH_BYTES", 500)
    encode = encoding._Worker.encode

    def killing(self, batch):
        self._process.kill()
        return encode(self, batch)

    monkeypatch.setattr(encoding._Worker, "encode", killing)
    with pytest.raises(UserError, match="ended with code -9.*no memory"):
        prepare(f"jsonl:{lines}", f"bpe:{bpe}", 32)
    assert len(list(data_folder.glob(".jsonl-*.partial/work/*.npz"))) >= 5


def test_a_file_that_is_not_utf8_is_named(tmp_path, bpe, corpus):
    bad = corpus / "17.txt"
    bad.write_bytes(b"words and words " * 3 + b"\xff")
    with pytest.raises(UserError, match=r"17\.txt is not UTF-8 \(invalid start byte at byte 48\)"):
        prepare(f"text:{corpus}", f"bpe:{bpe}", 8)


def test_progress_is_logged(lines, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(preparing, "_BATCH_BYTES", 500)
    logged = []
    signs = []
    prepare(f"jsonl:{lines}", "bytes", 32, log=logged.append, alive=lambda: signs.append(1))
    assert len(signs) > 400
    pattern = r"data: {}: [\d.]+ of {}[\d.]+ MB, [\d.,e-]+ MB a second, {}\d+ s left"
    for what, limit in (("tokenising", "at most "), ("packing", "")):
        assert any(re.match(pattern.format(what, limit, limit), x) for x in logged), logged


def test_few_lines_are_logged_otherwise(lines):
    logged = []
    prepare(f"jsonl:{lines}", "bytes", 32, log=logged.append)
    assert len(logged) == 2 and "preparing" in logged[0]


def test_signs_of_life_reach_a_process_that_waits(corpus, data_folder):
    """The other process prepares for seconds; this one calls `alive` meanwhile, and finds it."""
    code = f"""
        import time
        from qkvjax.data import sources, store
        from qkvjax.data.dataset import prepare
        store._HEARTBEAT_SECONDS = 0.1
        documents = sources.Source.documents
        def slow(self):
            for document in documents(self):
                time.sleep(0.1)
                yield document
        sources.Source.documents = slow
        prepare("text:{corpus}", "bytes", 16, log=lambda line: print(line, flush=True))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=-1, env=environment, text=True
    ) as other:
        assert "preparing" in other.stdout.readline()
        signs = []
        logged = []
        prepare(f"text:{corpus}", "bytes", 16, log=logged.append, alive=lambda: signs.append(1))
    assert other.returncode == 0
    assert len(logged) == 1 and len(signs) >= 5


def test_copies_are_counted(tmp_path):
    for i in range(14):
        (tmp_path / f"{i:02d}.txt").write_text(f"{i % 12:02d} words and words. " * 8)
    logged = []
    data = prepare(f"text:{tmp_path}", "bytes", 16, log=logged.append)
    assert any("2 of 14 documents repeat an earlier one" in line for line in logged)
    held_out = data.tokenizer.decode(data.validation.read(range(len(data.validation)))[:, 1:].flat)
    train = data.tokenizer.decode(data.train.read(range(len(data.train)))[:, 1:].flat)
    assert "00 words" not in held_out and "11 words" not in train


def test_the_digest_says_when_copies_moved_the_split(tmp_path, monkeypatch):
    for i in range(14):
        (tmp_path / f"{i:02d}.txt").write_text(f"{i % 12:02d} words and words. " * 8)
    with_copies = prepare(f"text:{tmp_path}", "bytes", 16).digest
    monkeypatch.setattr("qkvjax.data.split._by_position", by_position_alone)
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path / "other"))
    assert prepare(f"text:{tmp_path}/*.txt", "bytes", 16).digest != with_copies


def by_position_alone(documents):
    from qkvjax.data.split import _cuts

    return _cuts(documents), False


def a_text(size, held_out):
    """Returns a text whose hash is among the smallest (`held_out`), or is not."""
    while True:
        text = f"{random.random()} ".ljust(size, "x")
        first = hashlib.sha256(text.encode()).digest()[0]
        if first < 8 if held_out else first >= 64:
            return text


@pytest.mark.parametrize(
    ("sizes", "remark"),
    [
        ([100] * 20, None),
        ([100] * 18 + [3000] * 2, "validation text is larger than training text (0.01 MB"),
        ([100] * 19 + [1000], "one document is 91% of the validation text"),
        ([100, 101, 102, 103, 104], "one document is 100% of the validation text"),
        ([1000], None),
    ],
)
def test_a_lopsided_split_is_logged(tmp_path, sizes, remark):
    for i, size in enumerate(sizes):
        text = a_text(size, held_out=i >= 18)
        (tmp_path / f"{i:02d}.txt").write_text(text)
    logged = []
    prepare(f"text:{tmp_path}", "bytes", 8, log=logged.append)
    warnings = [line for line in logged if "warning" in line]
    assert remark in warnings[0] if remark else not warnings, logged


def test_committed_digests_stay():
    """The results of a study name the digest of the files of `json` of Python 3.11.7."""
    results = Path(__file__).parents[2] / "benchmarks/results/small_data/results.jsonl"
    recorded = {json.loads(line)["data_digest"] for line in open(results)}
    folder = Path(json.__file__).parent
    if sys.version_info[:3] != (3, 11, 7):
        pytest.skip("another version of these files")
    assert {prepare(f"text:{folder}/**/*.py", "bytes", 128).digest} == recorded


def test_digests_and_rows_stay_what_they_were(tmp_path):
    """The digests and rows of made-up corpora are those of version 1 of the copy."""
    rng = random.Random(1)
    hashes = []
    for count in (1, 7, 45):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            text = " ".join(rng.choices(["dé", "word", "and,", "\n"], k=rng.randrange(60, 90)))
            (folder / f"{i:02d}.txt").write_text(text)
        data = prepare(f"text:{folder}", "bytes", 16)
        rows = b"".join(rows.tobytes() for rows in rows_of(data))
        hashes.append((data.digest[:12], hashlib.sha256(rows).hexdigest()[:12]))
    assert hashes == RECORDED


RECORDED = [
    ("2a8b14f394b3", "a06b2941934a"),
    ("a856e8fe50a7", "9fe2a68bf95d"),
    ("51b5f3bca615", "2f38355a32db"),
]
