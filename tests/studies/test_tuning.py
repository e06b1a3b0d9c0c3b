"""What a study tunes, and which value it chooses. Nothing is trained here."""

import json

import ml_collections
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkvjax import config as configs
from qkvjax import sweep
from qkvjax.errors import UserError
from qkvjax.files import append_line
from qkvjax.report import files
from qkvjax.studies.grid import Study
from qkvjax.studies.point import heading, take_over
from qkvjax.studies.tuning import Tuning, read_tuning

RATES = (1e-3, 2e-3, 4e-3)
SHARED = sweep.axis("model.sharing", ("q-k-v", "q-k=v"))
SETTINGS = ({"label": "short", "train.steps": 5}, {"label": "long", "train.steps": 9})


@pytest.fixture
def study(tmp_path, monkeypatch):
    """study(tuned, points, seeds, settings, **fields) in one workdir."""
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path / "data"))
    book = tmp_path / "book.txt"
    book.write_text("a few words of text. " * 50)

    def make(tuned, points=SHARED, seeds=2, settings=(), **fields):
        config = configs.default()
        config.model.update(d_model=16, num_layers=1, num_heads=2)
        config.data.update(source=f"text:{book}", seq_len=16, batch_size=2)
        for name, value in fields.items():
            configs.set_field(config, name.replace("__", "."), value)
        group = {"points": points, "seeds": seeds, "settings": settings}
        config.study = ml_collections.ConfigDict(group)
        if tuned is not None:
            config.study.tuned = tuned
        (tmp_path / "study").mkdir(exist_ok=True)
        return Study(config, tmp_path / "study")

    return make


def rates(seeds=2, values=RATES):
    return sweep.tuned("optimizer.learning_rate", values, seeds)


def finish(study, tasks, score):
    """Writes lines of finished runs; score(task) is what they reached."""
    for task in tasks:
        line = {"status": "done", "error": None, "score": score(task), "metric": "bits_per_byte"}
        append_line(study.results, heading(study, task) | line)


def test_tuning_comes_first_and_its_seeds_are_others(study):
    made = study(rates(seeds=2), seeds=3, seed=7)
    tasks = made.tasks
    assert len(tasks) == len(made) == 2 * 3 * 2 + 2 * 3
    assert [task.number for task in tasks] == list(range(18))
    assert [task.phase for task in tasks] == ["tune"] * 12 + ["compare"] * 6
    assert {task.seed for task in tasks[:12]} == {107, 108}
    assert [task.seed for task in tasks[12:]] == [7, 7, 8, 8, 9, 9]
    assert [(task.label, task.value) for task in tasks[:6]] == [
        (label, rate) for label in ("QKV", "Q-K=V") for rate in RATES
    ]
    assert [task.waits for task in tasks] == [False] * 12 + [True] * 6


def test_a_tuning_run_is_the_run_of_an_ordinary_study(study):
    tuned = study(rates(seeds=(100, 101))).tasks
    points = sweep.product(SHARED, sweep.axis("optimizer.learning_rate", RATES))
    named = tuple({**point, "label": sweep.label(point)} for point in points)
    for grid in (points, named):
        ordinary = study(None, grid, seed=100).tasks
        assert [task.identity for task in ordinary] == [task.identity for task in tuned[:12]]
        assert [task.folder for task in ordinary] == [task.folder for task in tuned[:12]]
    assert ordinary[1].label == tuned[1].name == "QKV learning_rate=0.002"


def test_the_best_mean_is_compared(study):
    made = study(rates())
    scores = {1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5}
    better = {("Q-K=V", 4e-3): -1.0}
    finish(made, made.tasks[:11], lambda t: scores[t.value] + better.get((t.label, t.value), 0))
    assert made.chosen() == {("QKV", ""): 2e-3}
    waits = [task.waits for task in made.tasks[12:]]
    assert waits == [False, True, False, True]
    assert made.tasks[12].overrides["optimizer.learning_rate"] == 2e-3
    assert made.tasks[12].config.optimizer.learning_rate == 2e-3
    assert made.task(12) == made.tasks[12] and made.task(13).waits
    assert made.remarks() == []
    finish(made, made.tasks[11:12], lambda t: 1.5)
    assert made.chosen() == {("QKV", ""): 2e-3, ("Q-K=V", ""): 4e-3}
    assert made.remarks() == [
        "the best learning_rate of Q-K=V is the largest that was tried: try larger ones"
    ]
    points = sweep.product(SHARED, sweep.axis("optimizer.learning_rate", RATES))
    ordinary = {task.name: task for task in study(None, points, seeds=1).tasks}
    assert made.tasks[13].identity == ordinary["Q-K=V learning_rate=0.004"].identity


def test_each_setting_has_its_own_best(study):
    made = study(rates(seeds=1), seeds=1, settings=SETTINGS)
    assert len(made) == 2 * 2 * 3 + 2 * 2
    best = {"short": 1e-3, "long": 2e-3}
    finish(made, made.tasks[:12], lambda task: abs(task.value - best[task.setting]))
    compared = [(task.setting, task.label, task.value) for task in made.tasks[12:]]
    assert compared == [
        ("short", "QKV", 1e-3),
        ("short", "Q-K=V", 1e-3),
        ("long", "QKV", 2e-3),
        ("long", "Q-K=V", 2e-3),
    ]
    assert made.remarks()[0] == (
        "the best learning_rate of QKV in short is the smallest that was tried: try smaller ones"
    )
    made.claim("typed")
    written = json.loads((made.workdir / "study.json").read_text())["tuned"]
    assert written["field"] == "optimizer.learning_rate" and written["seeds"] == [100]
    assert written["values"] == list(RATES)
    assert {"label": "Q-K=V", "setting": "long", "value": 2e-3} in written["chosen"]


def test_other_values_choose_anew(study):
    """A value that is added makes the comparison wait, and what was compared before is left out."""
    made = study(rates(seeds=1, values=(1e-3, 2e-3)), seeds=1)
    finish(made, made.tasks[:4], lambda task: task.value)
    finish(made, made.tasks[4:], lambda task: task.value)
    assert made.pending() == []
    wider = study(rates(seeds=1, values=(1e-3, 2e-3, 5e-4)), seeds=1)
    assert [task.number for task in wider.pending()] == [2, 5, 6, 7]
    finish(wider, [wider.tasks[2], wider.tasks[5]], lambda task: task.value)
    assert [task.value for task in wider.pending()] == [5e-4, 5e-4]
    wider.claim("typed")
    read = files.read(wider.workdir)
    assert {line["phase"] for line in read.lines} == {"tune"} and read.notes == []


def test_the_reader_leaves_tuning_out(study):
    points = sweep.product(SHARED, sweep.axis("optimizer.learning_rate", RATES))
    ordinary = study(None, points, seed=100)
    finish(ordinary, ordinary.tasks, lambda task: task.config.optimizer.learning_rate)
    made = study(rates(seeds=2))
    take_over(made, made.tasks)
    finish(made, made.tasks[12:], lambda task: 1.0)
    made.claim("typed")
    read = files.read(made.workdir)
    compared = [line for line in read.lines if line["phase"] == "compare"]
    runs = sorted((line["label"], line["seed"]) for line in compared)
    assert runs == [("Q-K=V", 0), ("Q-K=V", 1), ("QKV", 0), ("QKV", 1)]
    assert {line["score"] for line in compared} == {1.0}
    assert len(read.lines) == 16 and read.notes == []
    before = made.results.read_text()
    take_over(made, made.tasks)
    assert made.results.read_text() == before


def test_a_tuned_study_goes_on_where_another_base_seed_tuned(study):
    points = sweep.product(SHARED, sweep.axis("optimizer.learning_rate", RATES))
    ordinary = study(None, points, seed=100)
    finish(ordinary, ordinary.tasks, lambda task: 1.0)
    ordinary.claim("first")
    study(rates(seeds=(100, 101))).claim("second")
    with pytest.raises(UserError, match="another base.*\n  seed: 0 -> 100"):
        study(None, points, seed=100).claim("third")


def test_the_lines_of_an_ordinary_study_stay(study):
    made = study(None)
    assert heading(made, made.tasks[0]).keys() == {
        "label",
        "setting",
        "overrides",
        "seed",
        "identity",
        "data_digest",
        "workdir",
    }
    made.claim("typed")
    assert "tuned" not in json.loads((made.workdir / "study.json").read_text())
    assert made.remarks() == [] and made.listing().startswith("point  state    seed  identity")


def test_an_empty_group_tunes_nothing(study):
    assert study({}).tuning is None


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        ({"field": "optimizer.b1"}, "is not a tuning: make it with qkvjax.sweep.tuned"),
        ({"field": 3, "values": (1, 2), "seeds": 1}, "study.tuned.field=3 is not a field"),
        (rates(values=(1e-3,)), "give at least two values"),
        (rates(values=(1e-3, 1e-3)), "has a value twice"),
        (rates(values=(1e-3, None)), "only numbers and texts"),
        (rates(seeds=0), "study.tuned.seeds=0: give a number of at least 1"),
        (rates(seeds=()), "list of different seeds"),
        (rates(seeds=(5, 5)), "list of different seeds"),
        (rates(seeds=(100, 1)), r"seed 1 tunes and is compared.*\[100, 1\].*are 0 to 1\): list"),
        (sweep.tuned("model.sharing", ("q-k-v", "q-k=v"), 1), "model.sharing is set in the grid"),
        (sweep.tuned("optimizer.learning_rat", (1, 2), 1), "did you mean 'optimizer.learning_rate"),
        (sweep.tuned("seed", (1, 2), 1), "'seed' is not a field"),
        (sweep.tuned("model.dropout", (0.5, 1.5), 1), "point 'QKV dropout=1.5' is not a valid"),
    ],
)
def test_bad_tunings_are_refused_before_anything_is_prepared(study, tmp_path, tuned, message):
    with pytest.raises(UserError, match=message):
        study(tuned)
    assert not (tmp_path / "data").exists()


def test_a_field_of_a_setting_is_not_tuned_as_well(study):
    with pytest.raises(UserError, match="train.steps is set in the grid and in study.tuned"):
        study(sweep.tuned("train.steps", (1, 2), 1), settings=SETTINGS)


@given(st.integers(0, 10_000), st.integers(1, 100), st.integers(1, 20))
def test_numbered_tuning_seeds_are_never_compared(first, compared, count):
    seeds = list(range(first, first + compared))
    group = {"field": "model.dropout", "values": [0, 1], "seeds": count}
    tuning = read_tuning(group, seeds, ())
    assert len(tuning.seeds) == count and not set(tuning.seeds) & set(seeds)


@given(st.dictionaries(st.floats(0.1, 9), st.lists(st.floats(0, 9), min_size=1), min_size=2))
def test_no_other_value_has_a_lower_mean(scores):
    best = Tuning("model.dropout", list(scores), [1]).best(scores)
    means = {value: sum(seeds) / len(seeds) for value, seeds in scores.items()}
    assert means[best] == min(means.values())


@pytest.mark.parametrize(
    ("values", "value", "remark"),
    [
        ([0.0, 0.3, 0.5], 0.0, None),  # nothing is smaller
        ([0.1, 0.3, 0.5], 0.3, None),
        ([0.1, 0.3, 0.5], 0.5, "the largest that was tried: try larger ones"),
        ([0.5, 0.1], 0.1, "the smallest that was tried: try smaller ones"),
        (["swiglu", "gelu"], "gelu", None),
    ],
)
def test_the_edge_of_the_values(values, value, remark):
    sentence = Tuning("model.dropout", values, [1]).remark("QKV", "", value)
    assert sentence == (remark and f"the best dropout of QKV is {remark}")
