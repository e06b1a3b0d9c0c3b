"""Scores of language models: every token once, whatever the batch size."""

import json
import math

import jax
import numpy as np
import pytest

from qkvjax import config as configs
from qkvjax.data.dataset import prepare
from qkvjax.errors import UserError
from qkvjax.evaluation.evaluators import make_evaluators
from qkvjax.evaluation.language import bits_per_byte, score
from qkvjax.models.build import build

T = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """30 documents of 1 to 65 bytes; lengths at, below and above multiples of T."""
    folder = tmp_path_factory.mktemp("corpus")
    lengths = [1, 2, T - 1, T, T + 1, 2 * T - 1, 2 * T, 2 * T + 1, 4 * T, 4 * T + 1] * 3
    rng = np.random.default_rng(0)
    for i, length in enumerate(lengths):
        (folder / f"{i:02d}.txt").write_bytes(rng.integers(97, 123, length, np.uint8).tobytes())
    return folder


@pytest.fixture(scope="module")
def dataset(corpus, tmp_path_factory):
    """dataset(**options): the corpus, prepared."""
    patch = pytest.MonkeyPatch()
    patch.setenv("QKVJAX_DATA_DIR", str(tmp_path_factory.mktemp("prepared")))
    yield lambda **options: prepare(f"text:{corpus}", "bytes", T, **options)
    patch.undo()


@pytest.fixture(scope="module")
def whole(dataset):
    return dataset(whole=True)


@pytest.fixture(scope="module")
def model(tiny):
    """Learned positions: under a rotation a shift of all positions of a window would not show."""
    return build(tiny(257, T, num_layers=1, sharing="q-k=v", position="learned"))


def direct(model, texts, separator):
    """Nats of each token of each document, straight from the model's logits."""
    rows, wanted = [], []
    for text in texts:
        stream = np.array([separator, *text])
        for start in range(0, len(text), T):
            window = stream[start : start + T + 1]
            rows.append(np.pad(window[:-1], (0, T + 1 - len(window))))
            wanted.append(window[1:])
    x, _ = model.hidden(np.stack(rows).astype(np.int32))
    log_p = np.asarray(jax.nn.log_softmax(model.logits(x)), np.float64)
    each = [-log_p[i, np.arange(len(ids)), ids] for i, ids in enumerate(wanted)]
    return np.concatenate(each)


def test_every_token_is_scored_once(model, whole, corpus):
    texts = [file.read_bytes() for file in sorted(corpus.iterdir())]
    nats = direct(model, texts, whole.tokenizer.separator)
    size = sum(map(len, texts))
    assert len(nats) == size
    found = score(model, whole, batch_size=8)
    assert found["num_labels"] == found["num_bytes"] == size and found["pad_fraction"] == 0
    assert found["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / size, rel=1e-5)
    assert found["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)


def test_batch_sizes_agree(model, whole):
    found = [score(model, whole, batch_size=size) for size in (1, 3, 16)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


def test_validation_and_training_documents_make_the_corpus(model, dataset, whole):
    """The held-out documents alone: fewer labels, and those of the whole corpus otherwise."""
    divided = dataset()
    held_out = score(model, divided, batch_size=4)
    everything = score(model, whole, batch_size=4)
    assert held_out["num_labels"] == divided.num_validation_tokens < everything["num_labels"]
    train = score(model, divided, batch_size=4, split="train")
    # Packed rows drop what fills no row at the end; separators are not scored.
    missing = everything["num_labels"] - held_out["num_labels"] - train["num_labels"]
    assert 0 <= missing <= T


def test_max_labels_does_not_depend_on_the_batch_size(model, whole):
    found = [score(model, whole, batch_size=size, max_labels=200) for size in (1, 7)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert 100 < found[0]["num_labels"] < 300
    limit = score(model, whole, batch_size=7, max_labels=10**9)
    assert limit["num_labels"] == score(model, whole, batch_size=7)["num_labels"]


def test_pads_are_scored_when_asked_as_the_paper_did(model, dataset, corpus):
    """One row a document, its first T tokens, every label of the row."""
    padded = dataset(score_pads=True, whole=True)
    found = score(model, padded, batch_size=4)
    lengths = [min(T, file.stat().st_size) for file in corpus.iterdir()]
    assert found["num_labels"] == len(lengths) * T and found["num_bytes"] == sum(lengths)
    assert found["pad_fraction"] == pytest.approx(1 - sum(lengths) / found["num_labels"])
    assert 0.1 < found["pad_fraction"] < 0.9


def test_a_uniform_model_needs_log2_of_the_vocabulary(model, whole):
    flat = jax.tree.map(np.zeros_like, model)  # all logits are zero
    found = score(flat, whole, batch_size=16)
    assert found["bits_per_byte"] == pytest.approx(math.log2(264), rel=1e-6)
    assert found["perplexity"] == pytest.approx(264, rel=1e-5)


def test_bits_per_byte():
    assert bits_per_byte(math.log(2) * 30, 10) == pytest.approx(3)
    assert math.isnan(bits_per_byte(1.0, 0))


def test_evaluators_of_a_config(model, whole):
    config = configs.default()
    config.evals = {
        "a": {"kind": "bits_per_byte", "split": "validation", "max_labels": 100},
        "b": {"kind": "bits_per_byte", "split": "validation", "max_labels": None},
    }
    configs.resolve(config)
    evaluators = make_evaluators(configs.resolve(config), whole, None)
    assert list(evaluators) == ["a", "b"]

    class State:
        pass

    State.model = model
    some, everything = evaluators["a"](State), evaluators["b"](State)
    assert some["num_labels"] < everything["num_labels"] == whole.num_validation_tokens
    json.dumps([some, everything], allow_nan=False)


def test_nothing_to_score(model, whole):
    class Empty:
        def scored_batches(self, *arguments):
            return iter(())

    with pytest.raises(UserError, match="no token to score: give a longer corpus"):
        score(model, Empty(), batch_size=2)
    with pytest.raises(UserError, match="split='test' is not one of train, validation"):
        score(model, whole, batch_size=2, split="test")
