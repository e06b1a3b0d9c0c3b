"""What computes the attention of a run is decided for what its train step will ask."""

import jax
import pytest

from qkvjax import config as configs
from qkvjax.kernels import choice
from qkvjax.parallel.target import Target
from qkvjax.training.implementation import settle_attention
from qkvjax.training.run import prepare_run
from qkvjax.training.step import make_train_step


@pytest.fixture
def gpu(monkeypatch):
    """Pretends a GPU on which every trial passes; gives the problems that were tried."""
    tried = []

    def failure(kernel, problem):
        tried.append(problem)

    monkeypatch.setattr(choice, "target", lambda: Target("gpu", "NVIDIA A10", "8.6", here=True))
    monkeypatch.setattr(choice.trial, "failure", failure)
    choice._decisions.clear()
    yield tried
    choice._decisions.clear()
    choice._agreed.clear()


def a_run(tmp_path, **model):
    (tmp_path / "corpus.txt").write_text("To be, or not to be, that is the question. " * 60)
    config = configs.default()
    config.model.update(num_layers=3, d_model=64, num_heads=4, **model)
    config.data.update(
        source=f"text:{tmp_path}/corpus.txt", tokenizer="bytes", seq_len=32, batch_size=4
    )
    config.train.update(steps=2, compute_dtype="bfloat16")
    return prepare_run(configs.resolve(config), log=lambda line: None)


def asked_by_the_train_step(run):
    with jax.set_mesh(run.mesh), choice.recording() as problems:
        step = make_train_step(run.config, run.optimizer, run.rate)
        jax.eval_shape(step, run.abstract, run.batch(0))
    return set(problems)


@pytest.mark.parametrize(
    "model",
    [
        {"sharing": "q-k=v", "num_kv_heads": 2, "window": 8},
        {"sharing": "q=k=v", "rotary_values": "raw"},
        {"sharing": "q-k-v", "num_kv_heads": 1, "score": ("column_bias",)},
    ],
)
def test_it_is_decided_for_what_the_train_step_asks(gpu, tmp_path, model):
    run = a_run(tmp_path, **model)
    assert settle_attention(run) == "triton"  # these batches have segments
    decided = set(gpu)
    assert decided == asked_by_the_train_step(run) and all(p.packed for p in decided)
    assert settle_attention(run) == "triton" and len(gpu) == len(decided)  # each is tried once


def test_on_a_cpu_nothing_is_tried(tmp_path):
    run = a_run(tmp_path)
    with choice.recording() as problems:
        assert settle_attention(run) == "xla"
    assert problems == []
