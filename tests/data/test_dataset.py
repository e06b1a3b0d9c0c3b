import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkvjax.data import tokenizers
from qkvjax.data.dataset import prepare
from qkvjax.data.order import training_rows
from qkvjax.errors import UserError


@pytest.fixture
def data(corpus):
    return prepare(f"text:{corpus}", "bytes", 16)


def scored_ids(data, **kwargs):
    """The scored targets in order."""
    batches = data.scored_batches(4, **kwargs)
    return np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])


def flat(batch):
    return {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_every_byte_of_validation_is_scored_once(data, corpus):
    documents = {file.read_bytes() for file in corpus.iterdir()}
    text = bytes(scored_ids(data).tolist())
    assert data.num_validation_tokens == len(text)
    held_out = [document for document in documents if document in text]
    assert len(held_out) == 4 and sum(map(len, held_out)) == len(text)
    stream = data.train.read(range(len(data.train)))[:, :-1].reshape(-1)
    train = bytes(stream[stream != 256].tolist())
    assert not any(document in train for document in held_out)
    assert data.num_train_tokens == len(stream)


def test_scored_batches_have_one_shape(data):
    batches = list(data.scored_batches(5))
    assert {batch["inputs"].shape for batch in batches} == {(5, 16)}
    assert sum(batch["num_bytes"].sum() for batch in batches) == data.num_validation_tokens
    assert sum(batch["weights"].sum() for batch in batches) == data.num_validation_tokens
    assert all((batch["pad_labels"] == 0).all() for batch in batches)
    np.testing.assert_array_equal(
        scored_ids(data), np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
    )


def test_max_labels_takes_rows_of_the_whole_split(data):
    def chosen(batch_size, split):
        batches = data.scored_batches(batch_size, 100, split)
        rows = np.concatenate([batch["inputs"][batch["weights"].any(1)] for batch in batches])
        return rows.tolist()

    for split in ("validation", "train"):
        assert chosen(1, split) == chosen(7, split)
        labels = sum(b["weights"].sum() for b in data.scored_batches(4, 100, split))
        assert 50 <= labels <= 150
    every = [row for b in data.scored_batches(1, split="train") for row in b["inputs"].tolist()]
    positions = [every.index(row) for row in chosen(1, "train")]
    assert positions == sorted(positions) and max(np.diff(positions)) - min(np.diff(positions)) <= 1


def test_training_rows_are_scored_without_separators(data):
    batches = list(data.scored_batches(4, split="train"))
    targets = np.concatenate([batch["targets"] for batch in batches])[: len(data.train)]
    assert sum(b["weights"].sum() for b in batches) == (targets != 256).sum()
    assert sum(b["num_bytes"].sum() for b in batches) == (targets != 256).sum()


def test_batch_is_a_function_of_seed_and_step(corpus, data):
    again = prepare(f"text:{corpus}", "bytes", 16)
    again.batch(3, 9, 4)  # earlier calls do not matter
    assert_same(data.batch(3, 2, 4), again.batch(3, 2, 4))
    inputs = data.batch(3, 2, 4)["inputs"]
    assert inputs.shape == (1, 4, 16)
    assert (inputs != data.batch(3, 3, 4)["inputs"]).any()
    assert (inputs != data.batch(4, 2, 4)["inputs"]).any()


def test_an_epoch_visits_every_row_once(data):
    rows = len(data.train)
    epochs = [data.batch(0, step, rows)["inputs"][0] for step in range(2)]
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(*(np.sort(epoch, axis=0) for epoch in epochs))
    twice = data.batch(0, 0, 2 * rows)["inputs"][0]
    np.testing.assert_array_equal(twice, np.concatenate(epochs))


@given(st.integers(0, 2**40), st.integers(0, 50), st.sampled_from([1, 2, 3, 6]))
def test_the_stream_of_rows_does_not_depend_on_how_it_is_cut(seed, step, size):
    def rows(start, stop):
        return training_rows(range(start, stop), 37, seed)

    cut = sum((rows(start, start + size) for start in range(step, step + 6, size)), [])
    assert cut == rows(step, step + 6)
    assert sorted(rows(37, 74)) == list(range(37))


def test_the_order_of_rows_stays_what_it_was():
    """A resumed run goes on in the order it began with, so the order is part of the format."""
    assert training_rows(range(8), 1000, 0) == [233, 815, 962, 246, 407, 428, 821, 490]


def test_accumulation_only_reshapes(data):
    whole, parts = data.batch(1, 5, 6), data.batch(1, 5, 6, accumulation=3)
    assert parts["weights"].shape == (3, 2, 16)
    assert_same(flat(whole), flat(parts))
    with pytest.raises(UserError, match="does not divide"):
        data.batch(1, 5, 6, accumulation=4)


def test_the_shards_of_a_batch_are_the_batch(data):
    """In any epoch, of any number of hosts, whatever was read before."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        seed, step, parts = int(rng.integers(2**31)), int(rng.integers(500)), rng.choice([1, 2])
        shards = rng.choice([1, 2, 3, 4, 6, 12 // parts])
        size = 12 // parts // shards
        if not size or 12 // parts % shards:
            continue
        whole = data.batch(seed, step, 12, parts)
        cut = {
            i: data.batch(seed, step, 12, parts, slice(i * size, (i + 1) * size))
            for i in rng.permutation(shards)
        }
        for name, array in whole.items():
            rows = np.concatenate([cut[i][name] for i in range(shards)], axis=1)
            np.testing.assert_array_equal(rows, array)


def test_steps_per_epoch(data):
    assert data.steps_per_epoch(4) == len(data.train) // 4
    assert data.steps_per_epoch(10**6) == 1


def test_batch_dtypes(data):
    dtypes = {name: array.dtype.name for name, array in data.batch(0, 0, 2).items()}
    assert dtypes.pop("weights") == "float32"
    assert dtypes == dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), "int32")


def test_score_pads_gives_one_padded_document_a_row(corpus):
    data = prepare(f"text:{corpus}", "bytes", 256, score_pads=True)
    assert len(data.train) == 36 and len(data.validation) == 4
    assert data.num_validation_tokens == 4 * 256
    batch = data.batch(0, 0, 8)
    assert (batch["weights"] == 1).all() and (batch["segment_ids"] == 1).all()
    assert (batch["inputs"][..., 0] == 256).all()
    np.testing.assert_array_equal(batch["positions"][0, 3], np.arange(256))
    (scored,) = data.scored_batches(5)
    filled = np.array([1, 1, 1, 1, 0])
    np.testing.assert_array_equal(scored["pad_labels"], (scored["targets"] == 256).sum(1) * filled)
    assert scored["weights"].sum(1).tolist() == [256] * 4 + [0]
    assert 0 < scored["pad_labels"].sum() == 4 * 256 - scored["num_bytes"].sum()


def test_whole_scores_every_document(corpus):
    data = prepare(f"text:{corpus}", "bytes", 16, whole=True)
    documents = [file.read_bytes() for file in sorted(corpus.iterdir())]
    assert bytes(scored_ids(data).tolist()) == b"".join(documents)
    with pytest.raises(ValueError, match="whole"):
        data.batch(0, 0, 1)


def test_one_file_holds_its_end_out(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("é" * 500)
    data = prepare(f"text:{file}", "bytes", 16)
    assert data.tokenizer.decode(scored_ids(data)) == "é" * 50


def test_the_copy_is_array_record_and_is_found_again(corpus, data_folder, data):
    lines = []
    again = prepare(f"text:{corpus}", "bytes", 16, log=lines.append)
    assert len(lines) == 1
    assert "40 documents" in lines[0] and again.description in lines[0]
    assert len(list(data_folder.glob("text-*"))) == 1
    assert len(list(data_folder.glob("text-*/packed_tokens/1.0.0/*.array_record*"))) == 2
    assert not list(data_folder.glob(".*.partial"))
    assert again.digest == data.digest
    assert_same(again.batch(0, 0, 4), data.batch(0, 0, 4))


def test_the_copy_is_a_tfds_data_set_for_others_too(data_folder, data):
    import tensorflow_datasets as tfds

    (folder,) = data_folder.glob("text-*")
    blocks = tfds.data_source("packed_tokens", data_dir=folder, split="train")
    rows = np.concatenate([block["tokens"] for block in blocks])
    assert rows.dtype == np.uint16
    np.testing.assert_array_equal(rows, data.train.read(range(len(data.train))))


def test_digest_follows_the_content_not_the_path(tmp_path, corpus, data):
    moved = tmp_path / "moved"
    corpus.rename(moved)
    assert prepare(f"text:{moved}", "bytes", 16).digest == data.digest
    assert prepare(f"text:{moved}", "bytes", 17).digest != data.digest
    assert prepare(f"text:{moved}", "bytes", 16, score_pads=True).digest != data.digest
    (moved / "00.txt").write_text("changed")
    assert prepare(f"text:{moved}", "bytes", 16).digest != data.digest


def test_a_crash_leaves_nothing_that_is_taken_for_complete(corpus, data_folder, monkeypatch):
    calls = []

    def encode(document):
        calls.append(document)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return np.frombuffer(document, np.uint8).astype(np.int32)

    monkeypatch.setattr(tokenizers, "_encode_bytes", encode)
    with pytest.raises(KeyboardInterrupt):
        prepare(f"text:{corpus}", "bytes", 16)
    assert not [path for path in data_folder.iterdir() if path.is_dir()]
    monkeypatch.undo()
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(data_folder))
    assert len(prepare(f"text:{corpus}", "bytes", 16).train)


def test_a_process_that_was_killed_leaves_its_remains_to_the_next(corpus, data_folder, data):
    (folder,) = data_folder.glob("text-*")
    partial = folder.with_name(f".{folder.name}.partial")
    folder.rename(partial)
    (partial / "summary.json").unlink()
    assert prepare(f"text:{corpus}", "bytes", 16).digest == data.digest
    assert not partial.exists()


def test_a_damaged_copy_is_refused(corpus, data_folder, data):
    (summary,) = data_folder.glob("text-*/summary.json")
    summary.write_text("{")
    with pytest.raises(UserError, match="damaged .*: delete that folder"):
        prepare(f"text:{corpus}", "bytes", 16)


def test_two_processes_prepare_at_once(corpus, data_folder):
    code = textwrap.dedent(f"""
        import sys
        from qkvjax.data.dataset import prepare
        data = prepare("text:{corpus}", "bytes", 16, log=lambda line: print(line, file=sys.stderr))
        print(data.digest, data.batch(0, 0, 4)["inputs"].sum())
        assert "tensorflow" not in sys.modules
    """)
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(outputs[0][0].splitlines()) == 1  # nothing of TFDS on stdout
    errors = "".join(error for _, error in outputs)
    assert errors.count("preparing") == 1
    assert all(line.startswith("data: ") for line in errors.splitlines())  # and no progress bar
    assert len(list(data_folder.glob("text-*"))) == 1


def test_too_little_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("twenty bytes of text")
    with pytest.raises(UserError, match="train split 18 tokens.*seq_len \\+ 1 = 257"):
        prepare(f"text:{file}", "bytes", 256)
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("the same")
    with pytest.raises(UserError, match="train split 0 tokens"):
        prepare(f"text:{tmp_path}/?*.txt".replace("?*", "[0-9]*"), "bytes", 4)
    file.write_text("")
    with pytest.raises(UserError, match="holds no text"):
        prepare(f"text:{file}", "bytes", 4)


def test_errors_while_reading_come_through(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\nno\n')
    with pytest.raises(UserError, match="line 2"):
        prepare(f"jsonl:{file}", "bytes", 4)


def test_a_data_folder_that_cannot_be_written(tmp_path, monkeypatch, corpus):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path / "file" / "data"))
    with pytest.raises(UserError, match="set QKVJAX_DATA_DIR"):
        prepare(f"text:{corpus}", "bytes", 4)
