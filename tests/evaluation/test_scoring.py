"""Scoring at real sizes: memory, packed rows, progress, and an early end."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax import config as configs
from qkvjax.data.dataset import prepare
from qkvjax.evaluation import accuracy, language, scoring
from qkvjax.evaluation.evaluators import compile_evaluators, make_evaluators
from qkvjax.models.build import build
from qkvjax.models.spec import model_spec

T = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """40 documents of 1 to 40 bytes, all held out."""
    patch = pytest.MonkeyPatch()
    patch.setenv("QKVJAX_DATA_DIR", str(tmp_path_factory.mktemp("prepared")))
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(40):
        text = rng.integers(97, 123, rng.integers(1, 41), np.uint8)
        (folder / f"{i:02d}.txt").write_bytes(text.tobytes())
    yield prepare(f"text:{folder}", "bytes", T, whole=True)
    patch.undo()


@pytest.fixture(scope="module")
def model(tiny):
    return build(tiny(257, T, num_layers=1, sharing="q-k=v"))


def test_short_windows_share_rows_and_see_only_themselves(dataset, model):
    batches = list(dataset.scored_batches(4))
    rows = sum((batch["weights"].sum(1) > 0).sum() for batch in batches)
    assert rows < len(dataset.validation)
    together = {}
    for batch in batches:
        arrays = {name: batch[name] for name in scoring.ARRAYS}
        x, _ = model.hidden(arrays["inputs"], arrays["positions"], arrays["segment_ids"])
        logits = np.asarray(model.logits(x))
        for row, segment in np.ndindex(4, T):
            in_segment = batch["segment_ids"][row] == segment + 1
            if in_segment.any():
                key = tuple(batch["targets"][row][in_segment])
                together[key] = (batch["inputs"][row][in_segment], logits[row][in_segment])
    for inputs, expected in together.values():
        alone = np.asarray(model.logits(model.hidden(inputs[None])[0]))[0]
        np.testing.assert_allclose(alone, expected, rtol=2e-5, atol=2e-5)


def test_scoring_needs_less_memory_than_a_training_step():
    """The vocabulary is GPT-2's: all logits of this batch would take 1.6 GB."""
    from qkvjax.training.fits import peak_bytes
    from qkvjax.training.run import compile_for

    config = configs.default()
    config.model.update(d_model=64, num_layers=1, num_heads=2)
    config.data.update(seq_len=512, batch_size=16)
    spec = model_spec(configs.resolve(config).model, 50_257, 512)
    mesh = jax.make_mesh(
        (1,) * 5,
        ("replica", "fsdp", "context", "tensor", "expert"),
        axis_types=(jax.sharding.AxisType.Explicit,) * 5,
        devices=jax.devices()[:1],
    )
    step, state = compile_for(configs.resolve(config), spec, mesh)
    batch = scoring.abstract_batch(mesh, scoring.num_rows(config, mesh), 512)
    assert batch["inputs"].shape == (16, 512)
    with jax.set_mesh(mesh):
        for program in (language.label_nats, accuracy.judge):
            scored = program.lower(state.model, batch, dtype=jnp.float32).compile()
            assert peak_bytes(scored) < 0.9 * peak_bytes(step)


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "rows"), [(64, 512, 32), (8, 512, 8), (4, 2**15, 1)]
)
def test_rows_of_a_scoring_batch(batch_size, seq_len, rows):
    """As many as a device scores at a time, and no more than it trains on at a time."""
    config = configs.default()
    config.data.update(batch_size=batch_size, seq_len=seq_len)
    assert scoring.num_rows(config, None) == rows


def test_a_pulse_is_called_after_each_batch_and_ends_the_scoring(dataset, model):
    calls = []

    def pulse():
        calls.append(len(calls))
        if len(calls) == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        language.score(model, dataset, batch_size=2, pulse=pulse)
    assert len(calls) == 3


def test_compiled_evaluators_give_the_same_scores(dataset, model):
    config = configs.default()
    config.data.update(seq_len=T, batch_size=4)
    config.evals = {"a": {"kind": "bits_per_byte"}, "b": {"kind": "accuracy", "max_labels": 200}}
    configs.resolve(config)

    state = types.SimpleNamespace(model=model)
    config = configs.resolve(config)
    first = make_evaluators(config, dataset, None)
    second = make_evaluators(config, dataset, None)
    assert len(compile_evaluators(first, jax.eval_shape(lambda: model))) == 2
    for name in ("a", "b"):
        assert first[name](state) == second[name](state)


def test_the_average_of_the_weights_is_scored(dataset, model):
    config = configs.default()
    config.data.update(seq_len=T, batch_size=4)

    state = types.SimpleNamespace(model=model, average=None)
    evaluate = make_evaluators(configs.resolve(config), dataset, None)["eval"]
    plain = evaluate(state)
    state.average = jax.tree.map(jnp.zeros_like, model)
    uniform = evaluate(state)
    assert uniform["loss"] == pytest.approx(np.log(264), rel=1e-5) != plain["loss"]


def test_likeliest_labels_of_a_language_model(dataset, model):
    """Computed by chunks of the logits, as from all logits at once."""
    right = []
    for batch in dataset.scored_batches(4):
        x, _ = model.hidden(batch["inputs"], batch["positions"], batch["segment_ids"])
        logits = model.logits(x)
        counts = batch["weights"] > 0
        right += (np.asarray(logits).argmax(-1) == batch["targets"])[counts].tolist()
    assert accuracy.score(model, dataset, batch_size=4)["accuracy"] == np.mean(right)
