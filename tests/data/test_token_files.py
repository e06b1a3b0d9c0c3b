import numpy as np
import pytest

from qkvjax.data.dataset import prepare
from qkvjax.data.token_files import document_spans
from qkvjax.errors import UserError

SEPARATOR = 256  # of the tokenizer "bytes"
T = 8


def write(path, documents, first=True):
    """Documents behind separators, or with the first one bare, as nanoGPT's splits begin."""
    tokens = np.concatenate([[SEPARATOR, *document] for document in documents])
    tokens[0 if first else 1 :].astype("<u2").tofile(path)
    return tokens[0 if first else 1 :]


def documents(seed, count):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, 30)).tolist() for _ in range(count)]


def scored(data):
    batches = list(data.scored_batches(3))
    return np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])


def test_a_folder_keeps_its_own_split(tmp_path):
    train = write(tmp_path / "train.bin", documents(0, 30))
    held_out = documents(1, 5)
    write(tmp_path / "val.bin", held_out, first=False)
    data = prepare(f"tokens:{tmp_path}", "bytes", T)
    assert data.num_documents == 35
    rows = data.train.read(range(len(data.train)))
    np.testing.assert_array_equal(rows[:, :-1].reshape(-1), train[: len(rows) * T])
    np.testing.assert_array_equal(scored(data), sum(held_out, []))
    assert data.num_validation_tokens == len(sum(held_out, []))
    for batch in data.scored_batches(1):
        assert batch["num_bytes"] == batch["weights"].sum()
    batch = data.batch(0, 0, 4, accumulation=2)
    starts = batch["inputs"] == SEPARATOR
    assert starts.any() and (batch["positions"][starts] == 0).all()


def test_a_window_reads_its_own_document(tmp_path):
    write(tmp_path / "a.bin", documents(2, 30))
    data = prepare(f"tokens:{tmp_path}/a.bin", "bytes", T, whole=True)
    batches = list(data.scored_batches(1))
    inputs = np.concatenate([batch["inputs"][batch["weights"] > 0] for batch in batches])
    expected = sum(([SEPARATOR, *document[:-1]] for document in documents(2, 30)), [])
    np.testing.assert_array_equal(inputs, expected)


def test_one_file_holds_its_last_tenth_out(tmp_path):
    tokens = write(tmp_path / "a.bin", documents(3, 40))
    data = prepare(f"tokens:{tmp_path}/a.bin", "bytes", T)
    cut = len(tokens) * 9 // 10
    tail = tokens[cut:]
    np.testing.assert_array_equal(scored(data), tail[tail != SEPARATOR])
    assert len(data.train) == (cut - 1) // T


def test_score_pads(tmp_path):
    write(tmp_path / "a.bin", documents(4, 40))
    data = prepare(f"tokens:{tmp_path}/a.bin", "bytes", T, score_pads=True)
    assert len(data.train) + len(data.validation) in (40, 41)  # one document may be cut
    assert (data.batch(0, 0, 4)["inputs"][..., 0] == SEPARATOR).all()
    assert sum(batch["weights"].sum() for batch in data.scored_batches(3)) == (
        data.num_validation_tokens
    )


def test_content_decides_the_digest(tmp_path):
    for name in ("a.bin", "b.bin"):
        write(tmp_path / name, documents(5, 30))
    a, b = (prepare(f"tokens:{tmp_path}/{name}", "bytes", T) for name in ("a.bin", "b.bin"))
    assert a.digest == b.digest
    write(tmp_path / "b.bin", documents(6, 30))
    assert prepare(f"tokens:{tmp_path}/b.bin", "bytes", T).digest != a.digest


def test_spans_leave_out_empty_documents():
    s = 9
    tokens = np.array([1, 2, s, s, 3, s, 4, 5, s], np.uint16)
    assert document_spans(tokens, s).tolist() == [[0, 2], [4, 5], [6, 8]]
    assert document_spans(tokens[:0], s).tolist() == []


def test_errors(tmp_path):
    file = tmp_path / "a.bin"
    np.array([1, 2, 300] * 9, "<u2").tofile(file)
    with pytest.raises(UserError, match="holds the id 300 and the tokenizer bytes has 257"):
        prepare(f"tokens:{file}", "bytes", 4)
    file.write_bytes(b"abc")
    with pytest.raises(UserError, match="odd number"):
        prepare(f"tokens:{file}", "bytes", 4)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        prepare(f"tokens:{file}", "bytes", 4)
    np.array([1, 2, 3] * 9, "<u2").tofile(file)
    with pytest.raises(UserError, match="train split 24 tokens.*= 65"):
        prepare(f"tokens:{file}", "bytes", 64)
    np.array([1] * 90 + [SEPARATOR] * 10, "<u2").tofile(file)
    with pytest.raises(UserError, match="validation split 0 tokens"):
        prepare(f"tokens:{file}", "bytes", 4)
    for name in ("train.bin", "val.bin"):
        np.array([1, 2, 3], "<u2").tofile(tmp_path / name)
    with pytest.raises(UserError, match="two files.*tokens:.*val.bin"):
        prepare(f"tokens:{tmp_path}", "bytes", 4, whole=True)
