"""The tasks of a study, and which of them are done. Nothing is trained here."""

import json
from pathlib import Path

import ml_collections
import pytest

from qkvjax import config as configs
from qkvjax.errors import UserError
from qkvjax.files import append_line
from qkvjax.studies import task
from qkvjax.studies.grid import Study
from qkvjax.sweep import axis, label

RESULTS = Path(__file__).parents[2] / "benchmarks/results/synthetic"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """study(points, seeds, **fields) in a workdir of its own."""
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path / "data"))
    book = tmp_path / "book.txt"
    book.write_text("a few words of text. " * 50)

    def make(points, seeds=2, **fields):
        config = configs.default()
        config.model.update(d_model=16, num_layers=1, num_heads=2)
        config.data.update(source=f"text:{book}", seq_len=16, batch_size=2)
        for name, value in fields.items():
            configs.set_field(config, name.replace("__", "."), value)
        config.study = ml_collections.ConfigDict({"points": points, "seeds": seeds})
        (tmp_path / "study").mkdir(exist_ok=True)
        return Study(config, tmp_path / "study")

    return make


SHARED = axis("model.sharing", ("q-k-v", "q-k=v", "q=k=v"))


def test_tasks_go_seed_by_seed(study):
    tasks = study(SHARED, seeds=2, seed=5).tasks
    assert [(t.number, t.label, t.seed) for t in tasks] == [
        (0, "QKV", 5),
        (1, "Q-K=V", 5),
        (2, "Q=K=V", 5),
        (3, "QKV", 6),
        (4, "Q-K=V", 6),
        (5, "Q=K=V", 6),
    ]
    assert len({t.identity for t in tasks}) == len({t.folder for t in tasks}) == 6
    assert tasks[4].config.model.sharing == "q-k=v" and tasks[4].config.seed == 6


def test_sharings_by_their_names_in_reports_are_the_same_tasks(study):
    named = study(axis("model.sharing", ("QKV", "Q-K=V", "q=K=v"))).tasks
    usual = study(SHARED).tasks
    assert [t.identity for t in named] == [t.identity for t in usual]
    assert [(t.label, t.overrides) for t in named] == [(t.label, t.overrides) for t in usual]


def test_equal_runs_with_two_labels_are_two_tasks(study):
    """An A/A study: a field that fixes nothing, or the label alone."""
    for points in (axis("train.log_every", (1, 2)), ({"label": "one"}, {"label": "two"})):
        tasks = study(points, seeds=1).tasks
        assert tasks[0].identity != tasks[1].identity and tasks[0].folder != tasks[1].folder


def test_what_a_run_is_fixes_its_identity(study):
    first = study(SHARED).tasks[0].identity
    assert study(SHARED).tasks[0].identity == first
    assert study(SHARED, train__log_every=7).tasks[0].identity == first
    for field, value in (("optimizer__b1", 0.8), ("train__steps", 7), ("data__batch_size", 4)):
        assert study(SHARED, **{field: value}).tasks[0].identity != first


def test_a_field_that_is_added_leaves_old_runs_what_they_are(study, monkeypatch):
    first = study(SHARED).tasks[0].identity
    identity = configs.identity

    def with_invented(value):
        return lambda config: identity(config) | {"model.invented": value}

    task.defaults.cache_clear()
    try:
        monkeypatch.setattr(configs, "identity", with_invented(3))
        assert study(SHARED).tasks[0].identity == first  # 3 is the default
        monkeypatch.setattr(configs, "identity", with_invented(4))
        assert study(SHARED).tasks[0].identity != first
    finally:
        task.defaults.cache_clear()


def test_the_results_in_the_repository_are_those_of_its_recipe(recipe):
    """What is finished is skipped, by its configuration and data as they are now."""
    lines = [json.loads(line) for line in open(RESULTS / "results.jsonl")]
    study = Study(recipe("configs/paper/synthetic.py"), RESULTS)
    done = study.done()
    assert len(done) == len(lines) and {line["identity"] for line in lines} == done.keys()


def test_the_only_setting_keeps_its_name(study, recipe, tmp_path):
    config = recipe("configs/paper/synthetic.py", "task=sort,width=64,layers=2,heads=2")
    made = Study(config, tmp_path)
    made.claim("typed")
    written = json.loads((tmp_path / "study.json").read_text())
    assert written["settings"] == [] and written["setting"] == "sort d64 L2 H2"
    assert written["setting"] in written["reference"]["values"]
    assert written["data"]["source"] == "synthetic:sort"


@pytest.mark.parametrize("length", [16, 64, 128])
def test_each_length_that_the_authors_ran_has_their_figures(recipe, length):
    study = recipe("configs/paper/synthetic.py", f"length={length}").study
    labels = {setting["label"] for setting in study["settings"]}
    values = configs.plain(study["reference"])["values"]
    assert values.keys() == labels
    for name, cell in values.items():
        assert cell.keys() == {label(point) for point in study["points"]}, name
        assert all(len(seeds) == 3 and 0 <= min(seeds) for seeds in cell.values()), name


def test_a_length_that_nobody_ran_has_none(recipe):
    assert recipe("configs/paper/synthetic.py", "length=32").study["reference"] is None


def test_done_is_by_identity_and_data(study, tmp_path):
    made = study(SHARED)
    digest = made.dataset.digest

    def line(task, **changes):
        append_line(
            made.results,
            {"identity": task.identity, "status": "done", "data_digest": digest} | changes,
        )

    line(made.tasks[0])
    line(made.tasks[1], status="failed")
    line(made.tasks[2], data_digest="of other data")
    line(made.tasks[3], status="failed")
    line(made.tasks[3])
    assert [t.number for t in made.pending()] == [1, 2, 4, 5]
    states = [row.split()[1] for row in made.listing().splitlines()[1:]]
    assert states == ["done", "failed", "-", "done", "-", "-"]


RUN = {"status": "failed", "identity": "0", "data_digest": "0"}


def test_claim_keeps_the_base(study):
    made = study(SHARED)
    made.claim("first")
    made.claim("second", keep_command=True)
    record = json.loads((made.workdir / "study.json").read_text())
    assert record["command"] == "first" and record["baseline"] == "QKV"
    assert [p["label"] for p in record["points"]] == ["QKV", "Q-K=V", "Q=K=V"]
    # Another grid or more seeds of the same base go on in the same workdir; another base does not.
    study(SHARED[:2], seeds=4).claim("third")
    study(SHARED, optimizer__b1=0.7).claim("no run is there yet: nothing is lost")
    study(SHARED).claim("first")
    append_line(made.results, RUN)
    with pytest.raises(UserError, match="another base.*\n  optimizer.b1: 0.9 -> 0.8"):
        study(SHARED, optimizer__b1=0.8).claim("fourth")


def test_the_same_data_by_another_path_are_the_same_study(study, tmp_path, monkeypatch):
    made = study(SHARED, data__source=f"text:{tmp_path}/book.txt")
    made.claim("first")
    task = made.tasks[0]
    line = {"identity": task.identity, "status": "done", "data_digest": made.dataset.digest}
    append_line(made.results, line)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        again = study(SHARED, data__source="text:book.txt")
        again.claim("second")
        assert [task.number for task in again.pending()] == [1, 2, 3, 4, 5]
        assert [task.folder for task in again.tasks] == [task.folder for task in made.tasks]


def test_claim_notices_other_data(study, tmp_path):
    made = study(SHARED)
    made.claim("first")
    append_line(made.results, RUN)
    (tmp_path / "book.txt").write_text("something else altogether. " * 50)
    with pytest.raises(UserError, match="data: [0-9a-f]{12} -> [0-9a-f]{12}"):
        study(SHARED).claim("second")


@pytest.mark.parametrize(
    ("points", "seeds", "message"),
    [
        ((), 2, "no grid"),
        ((1,), 2, "is not a grid"),
        (SHARED, 0, "study.seeds=0 must be at least 1"),
        ((*SHARED, SHARED[0]), 1, "two points of the grid are called 'QKV'"),
        (axis("seed", (1, 2)), 1, "sets `seed`"),
        (axis("model.num_heads", (2, 3)), 1, "point 'num_heads=3' is not a valid"),
        (axis("model.layer_overrides", ((), 3)), 1, "point 'layer_overrides=3'"),
        (axis("model.d_model", (16, "wide")), 1, "point 'd_model=wide'.*not of type int"),
        (axis("modle.d_model", (16,)), 1, "did you mean 'model.d_model'"),
    ],
)
def test_bad_grids_are_refused_before_anything_is_prepared(study, tmp_path, points, seeds, message):
    with pytest.raises(UserError, match=message):
        study(points, seeds)
    assert not (tmp_path / "data").exists()
