"""Points of the paper's synthetic study, trained: our runs against the authors' (slow).

Random numbers differ, so bands are compared. A run is 2 epochs of 10,000 lists of 16 digits, with
2 layers, 2 heads and width 64, unless a test sets another value.
"""

import numpy as np
import pytest

from qkvjax import config as configs
from qkvjax.training.train import train

pytestmark = pytest.mark.slow


@pytest.fixture
def accuracy(recipe, tmp_path, monkeypatch):
    """Trains one point of the study and returns its validation accuracy."""
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path))

    def run(task, seed=0, width=64, heads=2, epochs=2, **model):
        config = recipe("configs/paper/synthetic.py")
        config.train.steps = 79 * epochs
        config.data.source = f"synthetic:{task}"
        config.seed = seed
        for name, value in {"d_model": width, "num_heads": heads, **model}.items():
            configs.set_field(config, f"model.{name}", value)
        workdir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        workdir.mkdir()
        return train(configs.resolve(config), workdir, log=lambda line: None)["eval/accuracy"]

    return run


PLUS = ("score2d(10)",)


@pytest.mark.parametrize("task", ["copy", "sub"])
@pytest.mark.parametrize(
    "model",
    [
        *({"sharing": sharing} for sharing in ("q-k-v", "q-k=v", "q=k-v", "q=k=v")),
        *({"sharing": sharing, "score": PLUS} for sharing in ("q=k-v", "q=k=v")),
    ],
    ids=str,
)
def test_every_variant_learns_tasks_that_need_one_token(accuracy, task, model):
    assert accuracy(task, width=32, **model) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    ("task", "model", "low", "high"),
    [
        ("reverse", {}, 0.99, 1),
        ("reverse", {"sharing": "q-k=v"}, 0.99, 1),
        ("reverse", {"sharing": "q=k-v"}, 0.85, 1),
        ("reverse", {"sharing": "q=k-v", "score": PLUS}, 0.99, 1),
        ("reverse", {"sharing": "q=k=v"}, 0.25, 0.9),  # .470 to .679 there; mid-transition
        ("swap", {}, 0.99, 1),
        ("swap", {"sharing": "q-k=v"}, 0.99, 1),
        ("swap", {"sharing": "q=k-v"}, 0.93, 1),  # .985 to .999; here .941 to .998
        ("swap", {"sharing": "q=k-v", "score": PLUS}, 0.99, 1),
        ("swap", {"sharing": "q=k=v"}, 0.25, 0.99),
        ("sort", {}, 0.51, 0.69),  # .534 to .658
        ("sort", {"sharing": "q-k=v"}, 0.51, 0.65),  # .541 to .621
        ("sort", {"sharing": "q=k-v"}, 0.43, 0.56),  # .457 to .542
        ("sort", {"sharing": "q=k-v", "score": PLUS}, 0.64, 0.73),  # .660 to .708
        # Positions with small initial values are the negative control: .24 instead of 1.
        ("reverse", {"init": "uniform(positions=0.02)"}, 0.1, 0.5),
        ("reverse", {"init": "uniform(positions=0.02)", "sharing": "q-k=v"}, 0.1, 0.5),
        # Of the parts of "+", the scale helps: .679 with it alone, .50 with a column bias alone.
        ("sort", {"sharing": "q=k-v", "score": ("score_scale",)}, 0.64, 0.73),
        ("sort", {"sharing": "q=k-v", "score": ("column_bias",)}, 0.43, 0.58),
        ("sort", {"score": ("score_scale",)}, 0.61, 0.75),  # .638 to .720
    ],
    ids=str,
)
def test_the_band_of_the_paper(accuracy, task, model, low, high):
    assert low <= accuracy(task, **model) <= high


def test_ten_epochs_learn_what_two_do_not(accuracy):
    """REVERSE with one projection for all three: .47 to .68 after two epochs, 1 after ten."""
    assert accuracy("reverse", sharing="q=k=v", epochs=10) > 0.99


def test_below_the_threshold_only_the_order_of_means_holds(accuracy):
    means = [
        np.mean([accuracy("reverse", seed, 32, sharing=sharing) for seed in range(3)])
        for sharing in ("q-k-v", "q-k=v", "q=k=v")
    ]
    assert means[0] > means[1] > means[2] and means[0] < 0.7


@pytest.mark.parametrize(
    ("model", "low", "high"),
    [
        ({}, 0.93, 0.99),  # .956 to .972
        ({"sharing": "q-k=v"}, 0.93, 0.995),  # .964 to .985
        ({"sharing": "q=k-v"}, 0.66, 0.77),  # .701 to .732
        ({"sharing": "q=k=v"}, 0.6, 0.74),  # .681 to .693; .638 in another re-run
        ({"sharing": "q=k-v", "score": PLUS}, 0.98, 1),  # .992 to .994
        ({"sharing": "q=k=v", "score": PLUS}, 0.98, 1),
    ],
    ids=str,
)
def test_sort_of_the_wide_model(accuracy, model, low, high):
    assert low <= accuracy("sort", width=256, heads=4, **model) <= high
