"""Scores of language models: every token once, whatever the batch size."""

import json
import math
import types

import jax
import numpy as np
import pytest

from qkvjax import config as configs
from qkvjax.data.dataset import prepare
from qkvjax.errors import UserError
from qkvjax.evaluation import accuracy
from qkvjax.evaluation.evaluators import make_evaluators
from qkvjax.evaluation.items import Items
from qkvjax.evaluation.language import bits_per_byte, score
from qkvjax.models.build import build
from qkvjax.models.lm import LanguageModel

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
    model = build(tiny(257, T, num_layers=1, sharing="q-k=v", position="learned"))
    model.positions[...] *= 30  # so that they matter
    return model


def direct(model, texts, separator):
    """Returns the nats of each token of each document, computed from the model's logits."""
    rows = []
    targets = []
    for text in texts:
        stream = np.array([separator, *text])
        for start in range(0, len(text), T):
            window = stream[start : start + T + 1]
            rows.append(np.pad(window[:-1], (0, T + 1 - len(window))))
            targets.append(window[1:])
    x, _ = model.hidden(np.stack(rows).astype(np.int32))
    log_p = np.asarray(jax.nn.log_softmax(model.logits(x)), np.float64)
    each = [-log_p[i, np.arange(len(ids)), ids] for i, ids in enumerate(targets)]
    return np.concatenate(each)


def test_every_token_is_scored_once(model, whole, corpus):
    texts = [file.read_bytes() for file in sorted(corpus.iterdir())]
    nats = direct(model, texts, whole.tokenizer.separator)
    size = sum(map(len, texts))
    assert len(nats) == size
    scores = score(model, whole, batch_size=8)
    assert scores["num_labels"] == scores["num_bytes"] == size and scores["pad_fraction"] == 0
    assert scores["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / size, rel=1e-5)
    assert scores["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)


def test_batch_sizes_agree(model, whole):
    scores = [score(model, whole, batch_size=size) for size in (1, 3, 16)]
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-6)


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


def test_packed_rows_of_the_training_split_score_like_their_documents_alone(tiny, filled, dataset):
    """A document that starts inside a row sees nothing of the document before it."""
    spec = tiny(257, T, num_layers=1, sharing="q-k=v", position="learned")
    model = filled(lambda: LanguageModel(spec, key=jax.random.key(0)))
    divided = dataset()
    separator = divided.tokenizer.separator
    rows = divided.train.read(np.arange(len(divided.train)))
    assert rows.shape[1] == T + 1

    @jax.jit
    def log_probabilities(ids):
        x, _ = model.hidden(ids)
        return jax.nn.log_softmax(model.logits(x))

    nats_of_rows = []
    num_documents = []
    for row in rows:
        inputs, targets = row[:-1], row[1:]
        starts = sorted({0, *np.flatnonzero(inputs == separator)})
        nats = 0.0
        for start, end in zip(starts, [*starts[1:], T], strict=True):
            alone = np.zeros((1, T), np.int32)  # zeros behind the document are not seen by it
            alone[0, : end - start] = inputs[start:end]
            log_p = np.asarray(log_probabilities(alone), np.float64)[0]
            for i, target in enumerate(targets[start:end]):
                if target != separator:
                    nats -= log_p[i, target]
        nats_of_rows.append(nats)
        num_documents.append(len(starts))
    assert max(num_documents) > 2

    items = Items()
    result = score(model, divided, batch_size=4, split="train", items=items)
    bits_of_rows = items.arrays()["value"]
    np.testing.assert_allclose(bits_of_rows * math.log(2), nats_of_rows, rtol=1e-5)
    assert result["num_labels"] == np.count_nonzero(rows[:, 1:] != separator)
    assert result["loss"] == pytest.approx(sum(nats_of_rows) / result["num_labels"], rel=1e-5)
    by_accuracy = accuracy.score(model, divided, batch_size=4, split="train")
    assert by_accuracy["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_max_labels_does_not_depend_on_the_batch_size(model, whole):
    scores = [score(model, whole, batch_size=size, max_labels=200) for size in (1, 7)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    assert 100 < scores[0]["num_labels"] < 300
    limit = score(model, whole, batch_size=7, max_labels=10**9)
    assert limit["num_labels"] == score(model, whole, batch_size=7)["num_labels"]


def test_padding_is_scored_with_score_pads_as_the_paper_did(model, dataset, corpus):
    """One row a document, its first T tokens, every label of the row."""
    padded = dataset(score_pads=True, whole=True)
    scores = score(model, padded, batch_size=4)
    lengths = [min(T, file.stat().st_size) for file in corpus.iterdir()]
    assert scores["num_labels"] == len(lengths) * T and scores["num_bytes"] == sum(lengths)
    assert scores["pad_fraction"] == pytest.approx(1 - sum(lengths) / scores["num_labels"])
    assert 0.1 < scores["pad_fraction"] < 0.9


def test_perplexity_is_per_label_where_padding_is_scored_too(model, dataset):
    """Padding has labels and no bytes, so that a perplexity per byte would be another number."""
    padded = dataset(score_pads=True, whole=True)
    scores = score(model, padded, batch_size=4)
    assert scores["num_bytes"] < 0.9 * scores["num_labels"]
    nats = scores["bits_per_byte"] * scores["num_bytes"] * math.log(2)
    assert scores["loss"] == pytest.approx(nats / scores["num_labels"], rel=1e-9)
    assert scores["perplexity"] == pytest.approx(math.exp(nats / scores["num_labels"]), rel=1e-9)
    flat = score(jax.tree.map(np.zeros_like, model), padded, batch_size=4)
    assert flat["perplexity"] == pytest.approx(264, rel=1e-5)


def test_perplexity_is_per_token_where_tokens_have_several_bytes(tiny, tmp_path, monkeypatch):
    """A uniform model: the perplexity is the vocabulary, whatever the bytes of the tokens."""
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path / "prepared"))
    text = "the cat and the dog, and the hat. " * 9
    (tmp_path / "text.txt").write_text(text)
    tokenizer = train_bpe(tmp_path / "tokenizer.json", text)
    data = prepare(f"text:{tmp_path}/text.txt", f"bpe:{tokenizer}", T, whole=True)
    spec = tiny(data.tokenizer.num_ids, T, num_layers=1)
    flat = jax.tree.map(np.zeros_like, build(spec))  # all logits are zero
    scores = score(flat, data, batch_size=2)
    assert scores["num_bytes"] == len(text) > 2 * scores["num_labels"]
    nats_per_label = math.log(spec.vocab_size)
    assert scores["loss"] == pytest.approx(nats_per_label, rel=1e-6)
    assert scores["perplexity"] == pytest.approx(spec.vocab_size, rel=1e-5)
    labels_per_byte = scores["num_labels"] / scores["num_bytes"]
    assert scores["bits_per_byte"] == pytest.approx(
        nats_per_label / math.log(2) * labels_per_byte, rel=1e-6
    )


def train_bpe(path, text):
    """Writes a tokenizer that has merged frequent words of the text; returns its path."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    bpe.save(str(path))
    return path


def test_a_uniform_model_needs_log2_of_the_vocabulary(model, whole):
    flat = jax.tree.map(np.zeros_like, model)  # all logits are zero
    scores = score(flat, whole, batch_size=16)
    assert scores["bits_per_byte"] == pytest.approx(math.log2(264), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(264, rel=1e-5)


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

    state = types.SimpleNamespace(model=model)
    some, everything = evaluators["a"](state), evaluators["b"](state)
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
