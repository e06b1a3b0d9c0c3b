"""Scores by document or example: they add up to the score and name the same documents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkvjax.data.dataset import prepare
from qkvjax.evaluation import language
from qkvjax.evaluation.items import Items

LABELS = st.lists(
    st.tuples(st.integers(0, 9), st.floats(0, 9), st.integers(0, 4)), min_size=1, max_size=40
)


@given(LABELS, st.integers(1, 7))
def test_sums_do_not_depend_on_how_labels_are_divided(labels, size):
    whole, parts = Items(), Items()
    items, values, weights = (np.array(column) for column in zip(*labels))
    whole.add(items, values, weights)
    for start in range(0, len(items), size):
        part = slice(start, start + size)
        parts.add(items[part], values[part], weights[part])
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(array, parts.arrays()[name])
    assert whole.arrays()["num_labels"].sum() == len(labels)


def test_a_saved_file_has_the_sums(tmp_path):
    items = Items()
    items.add(np.array([3, 3, 7]), np.array([0.5, 1.0, 2.0]), np.array([1, 2, 4]))
    items.save(tmp_path / "items" / "eval.npz")
    with np.load(tmp_path / "items" / "eval.npz") as saved:
        assert saved["item"].tolist() == [3, 7] and saved["value"].tolist() == [1.5, 2.0]
        assert saved["weight"].tolist() == [3, 4] and saved["num_labels"].tolist() == [2, 1]
    assert [path.name for path in (tmp_path / "items").iterdir()] == ["eval.npz"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(30):
        text = chr(97 + number % 26) * (40 + 7 * number)
        (folder / f"{number:02}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("source", ["documents", "tokens"])
def test_documents_add_up_to_the_score(corpus, tmp_path, monkeypatch, model, source):
    """The documents are those of the validation split, each with all its bytes."""
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path))
    name = f"text:{corpus}/*.txt"
    if source == "tokens":
        # Three documents, each ended by the separator 256.
        (tmp_path / "tokens").mkdir()
        lengths = (50, 90, 61)
        stream = np.concatenate(
            [np.append(np.full(n, 5 + i, np.uint16), 256) for i, n in enumerate(lengths)]
        ).astype(np.uint16)
        stream.tofile(tmp_path / "tokens/train.bin")
        stream.tofile(tmp_path / "tokens/val.bin")
        name = f"tokens:{tmp_path}/tokens"
    data = prepare(name, "bytes", 16)
    m = model(tokenizer_size=257)
    items = Items()
    scores = language.score(m, data, batch_size=3, items=items)
    sums = items.arrays()
    assert sums["value"].sum() / sums["weight"].sum() == pytest.approx(scores["bits_per_byte"])
    assert sums["num_labels"].sum() == data.num_validation_tokens
    if source == "tokens":
        assert sums["weight"].tolist() == list(lengths)
    else:
        assert sums["item"].tolist() == list(range(len(sums["item"])))
        assert set(sums["weight"]) <= {40 + 7 * number for number in range(30)}
    again = Items()
    language.score(m, data, batch_size=7, items=again)
    np.testing.assert_allclose(sums["value"], again.arrays()["value"], rtol=1e-6)


def test_a_sample_names_the_documents_of_the_whole(corpus, tmp_path, monkeypatch, model):
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path))
    data = prepare(f"text:{corpus}/*.txt", "bytes", 16)
    m = model(tokenizer_size=257)
    whole, sample = Items(), Items()
    language.score(m, data, batch_size=4, items=whole)
    language.score(m, data, batch_size=4, max_labels=150, items=sample)
    sizes = dict(zip(whole.arrays()["item"], whole.arrays()["weight"]))
    part = sample.arrays()
    assert 0 < part["weight"].sum() < sum(sizes.values())
    assert all(weight <= sizes[item] for item, weight in zip(part["item"], part["weight"]))
