"""Accuracy: over all labels, as a mean over classes, and whether a task was learned."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax import config as configs
from qkvjax.data.examples import Examples, Labelled
from qkvjax.errors import UserError
from qkvjax.evaluation.accuracy import SOLVED, score
from qkvjax.evaluation.evaluators import make_evaluators


class Echo(dict):
    """A model whose likeliest class is the input symbol itself."""

    def __call__(self, inputs, positions, segment_ids, dtype):
        return 9.0 * jax.nn.one_hot(inputs, 3)


jax.tree_util.register_pytree_node(Echo, lambda model: ((), None), lambda *_: Echo())


def examples(inputs, targets, weights=None):
    split = Labelled(np.array(inputs), np.array(targets), weights)
    return Examples("by hand", split, split, len(inputs[0]), 3, 3, "tokens")


def test_by_hand():
    data = examples([[0, 0], [0, 1], [1, 2]], [[0, 0], [0, 0], [1, 0]])
    for batch_size in (1, 2, 5):
        scores = score(Echo(), data, batch_size=batch_size)
        assert scores["accuracy"] == pytest.approx(4 / 6) and scores["num_labels"] == 6
        assert scores["error"] == pytest.approx(2 / 6)
        assert scores["class_accuracy"] == pytest.approx((3 / 5 + 1) / 2)  # classes 0 and 1
        assert scores["solved"] == 0
        right, wrong = np.log(1 + 2 * np.exp(-9)), np.log(1 + 2 * np.exp(-9)) + 9
        assert scores["loss"] == pytest.approx((4 * right + 2 * wrong) / 6, rel=1e-4)


def test_labels_of_weight_0_do_not_count():
    weights = np.array([[1, 0], [1, 0]], np.float32)
    scores = score(Echo(), examples([[0, 0], [1, 1]], [[0, 2], [1, 2]], weights), batch_size=2)
    assert (scores["accuracy"], scores["solved"], scores["num_labels"]) == (1, 1, 2)
    assert SOLVED < 1
    nothing = examples([[0]], [[0]], np.zeros((1, 1), np.float32))
    with pytest.raises(UserError, match="no label to score"):
        score(Echo(), nothing, batch_size=1)


def test_bits_per_byte_need_text():
    data = examples([[0]], [[0]])
    with pytest.raises(UserError, match="use accuracy"):
        make_evaluators(configs.resolve(configs.default()), data, None)
    config = configs.default()
    config.evals.eval = {"kind": "accuracy", "split": "train", "max_labels": 1}
    state = types.SimpleNamespace(model=Echo())
    assert make_evaluators(configs.resolve(config), data, None)["eval"](state)["accuracy"] == 1


def test_the_text_of_a_language_model_has_an_accuracy_too(tmp_path, model):
    from qkvjax.data.dataset import prepare

    (tmp_path / "a.txt").write_text("some words " * 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QKVJAX_DATA_DIR", str(tmp_path))
        data = prepare(f"text:{tmp_path / 'a.txt'}", "bytes", 16)
    scores = score(model(tokenizer_size=257), data, batch_size=2)
    assert 0 <= scores["accuracy"] < 0.5 and scores["num_labels"] == data.num_validation_tokens
    assert jnp.isfinite(scores["loss"])
