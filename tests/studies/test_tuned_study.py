"""A tuned study: the smallest model, a few steps, both phases in this process."""

import contextlib
import csv
import io
import json

import pytest

from qkvjax.commands import study as study_command
from qkvjax.errors import UserError
from qkvjax.report import page
from qkvjax.studies import point, processes

RECIPE = """
import ml_collections
from qkvjax import config as base
from qkvjax import sweep

def get_config(arg=None):
    options = base.parse_arg(arg, tuned=1)
    config = base.default()
    config.model.update(d_model=16, num_layers=1, num_heads=2, mlp_ratio=1.0)
    config.data.update(source="text:CORPUS", seq_len=16, batch_size=4)
    config.train.update(steps=4, log_every=4, eval_every=4, checkpoint_every=4)
    config.evals.eval.max_labels = 200
    points = sweep.axis("model.sharing", ("q-k-v", "q-k=v"))
    config.study = ml_collections.ConfigDict(
        {"title": "Tuned", "points": points, "seeds": 2, "prompt": "the "}
    )
    if options.tuned:
        config.study.tuned = sweep.tuned("optimizer.learning_rate", (1e-3, 1e-2), seeds=2)
    else:
        rates = sweep.axis("optimizer.learning_rate", (1e-3, 1e-2))
        config.study.points = sweep.product(points, rates)
        config.seed = 100
    return config
"""
RATES = (1e-3, 1e-2)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "corpus").mkdir()
    for i in range(30):
        text = f"the cat number {i} sat on the mat and the dog ran home. " * (i % 3 + 1)
        (folder / "corpus" / f"{i}.txt").write_text(text)
    path = folder / "grid.py"
    path.write_text(RECIPE.replace("CORPUS", str(folder / "corpus")))
    return path


@pytest.fixture(scope="module", autouse=True)
def kept_programs(grid, programs_kept_in):
    """A cache of compiled programs: all runs compile the same few."""
    with programs_kept_in(str(grid.parent / "compiled")):
        yield


@pytest.fixture
def untrained(monkeypatch):
    """Gives each run a score by a formula, and leaves the report out."""

    def trained(made, task):
        score = 2 + task.config.optimizer.learning_rate + task.seed / 1e6
        line = {"status": "done", "error": None, "metric": "bits_per_byte", "score": score}
        return point.heading(made, task) | line

    monkeypatch.setattr(point, "_train", trained)
    monkeypatch.setattr(page, "write_report", lambda workdir: workdir / "report.html")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, grid, in_process):
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(grid.parent / "data"))


@pytest.fixture
def study(grid):
    """study(workdir, *flags, arg="") -> (exit code, stdout, stderr)."""

    def run(workdir, *flags, arg=""):
        out, err = io.StringIO(), io.StringIO()
        config = f"--config={grid}:{arg}" if arg else f"--config={grid}"
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = study_command.main(["qkvjax study", config, f"--workdir={workdir}", *flags])
        return code, out.getvalue(), err.getvalue()

    return run


def lines(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def states(listing):
    return [row.split()[2] for row in listing.splitlines() if row.split()[0].isdecimal()]


def best(records, label):
    """The rate with the lowest mean score of the tuning runs."""
    scores = {}
    for line in records:
        if line["phase"] == "tune" and line["label"] == label:
            scores.setdefault(line["tuned"], []).append(line["score"])
    return min(scores, key=lambda rate: sum(scores[rate]))


def test_both_phases_in_one_command_and_after_a_kill_between_them(study, tmp_path, monkeypatch):
    start = processes.start_run

    def killed(made, task, *how):
        if task.phase == "compare":
            raise KeyboardInterrupt
        return start(made, task, *how)

    monkeypatch.setattr(processes, "start_run", killed)
    code, *_ = study(tmp_path, "--jobs=1")
    assert code == 130
    tuning = lines(tmp_path)
    assert [line["phase"] for line in tuning] == ["tune"] * 8
    _, listed, _ = study(tmp_path, "--list")
    assert states(listed) == ["done"] * 8 + ["-"] * 4

    monkeypatch.setattr(processes, "start_run", start)
    code, out, _ = study(tmp_path, "--jobs=1")
    assert code == 0 and "12 runs, 8 finished" in out
    assert "2 variants x (2 values of learning_rate x 2 tuning seeds, then" in out
    records = lines(tmp_path)
    assert records[:8] == tuning
    compared = records[8:]
    assert [(r["label"], r["seed"], r["phase"]) for r in compared] == [
        ("QKV", 0, "compare"),
        ("Q-K=V", 0, "compare"),
        ("QKV", 1, "compare"),
        ("Q-K=V", 1, "compare"),
    ]
    chosen = {label: best(records, label) for label in ("QKV", "Q-K=V")}
    for line in compared:
        rate = chosen[line["label"]]
        assert line["tuned"] == line["overrides"]["optimizer.learning_rate"] == rate
        assert f"learning_rate={rate}" in line["workdir"]
        config = json.loads((tmp_path / line["workdir"] / "config.json").read_text())
        assert config["optimizer"]["learning_rate"] == rate
    written = json.loads((tmp_path / "study.json").read_text())
    assert written["seeds"] == [0, 1]
    assert written["tuned"] == {
        "field": "optimizer.learning_rate",
        "values": list(RATES),
        "seeds": [100, 101],
        "chosen": [
            {"label": label, "setting": "", "value": rate} for label, rate in chosen.items()
        ],
    }
    edge = {
        1e-3: "smallest that was tried: try smaller",
        1e-2: "largest that was tried: try larger",
    }
    for label, rate in chosen.items():
        assert f"the best learning_rate of {label} is the {edge[rate]} ones\n" in out
    with open(tmp_path / "results.csv") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert {row["num_seeds"] for row in rows.values()} == {"2"}
    assert "belong to variants" not in (tmp_path / "report.md").read_text()
    again = study(tmp_path)
    assert "all 12 runs are finished" in again[1] and lines(tmp_path) == records
    assert study(tmp_path, "--report_only")[0] == 0


def test_runs_of_an_ordinary_study_are_taken_over(study, untrained, tmp_path):
    assert study(tmp_path, "--jobs=1", arg="tuned=0")[0] == 0
    ordinary = lines(tmp_path)
    assert {line["label"] for line in ordinary} == {
        f"{label} learning_rate={rate}" for label in ("QKV", "Q-K=V") for rate in RATES
    }
    assert not any({"phase", "tuned"} & line.keys() for line in ordinary)
    code, out, err = study(tmp_path, "--jobs=1")
    assert code == 0 and "12 runs, 8 finished" in out, err
    named = lines(tmp_path)[8:16]
    assert [line["phase"] for line in named] == ["tune"] * 8
    assert {line["label"] for line in named} == {"QKV", "Q-K=V"}
    assert [line["score"] for line in named] == [line["score"] for line in ordinary]
    assert [line["identity"] for line in named] == [line["identity"] for line in ordinary]
    assert len(lines(tmp_path)) == 20


def test_job_arrays_number_both_phases(study, untrained, tmp_path):
    _, listed, _ = study(tmp_path, "--list")
    assert states(listed) == ["-"] * 8 + ["waits"] * 4
    code, _, err = study(tmp_path, "--point=9")
    assert code == 2
    assert "compares Q-K=V at its best optimizer.learning_rate, which is not known yet" in err
    assert "4 of 4 tuning runs are not finished" in err
    for number in (2, 3, 6):
        assert study(tmp_path, f"--point={number}")[0] == 0
    code, _, err = study(tmp_path, "--point=9")
    assert code == 2 and "1 of 4" in err
    assert "--point=7 (Q-K=V learning_rate=0.01, seed 101)" in " ".join(err.split())
    assert study(tmp_path, "--point=7")[0] == 0
    assert study(tmp_path, "--point=9")[0] == 0
    last = lines(tmp_path)[-1]
    assert (last["label"], last["seed"], last["phase"]) == ("Q-K=V", 0, "compare")
    _, listed, _ = study(tmp_path, "--list")
    expected = ["-", "-", "done", "done", "-", "-", "done", "done", "waits", "done", "waits", "-"]
    assert states(listed) == expected
    assert study(tmp_path, "--report_only")[0] == 0


def test_a_point_waits_for_a_tuning_run_that_failed(study, untrained, tmp_path, monkeypatch):
    train = point._train

    def failing(made, task):
        if task.number == 0:
            raise UserError("the disk is full")
        return train(made, task)

    monkeypatch.setattr(point, "_train", failing)
    code, out, _ = study(tmp_path, "--jobs=1")
    assert code == 0 and "1 runs failed" in out
    assert "2 runs of QKV wait for tuning runs that are not finished" in out
    assert "remove it from config.study.tuned.values" in out
    compared = [line for line in lines(tmp_path) if line.get("phase") == "compare"]
    assert [line["label"] for line in compared] == ["Q-K=V", "Q-K=V"]
    _, listed, _ = study(tmp_path, "--list")
    assert states(listed)[0] == "failed" and states(listed)[8:] == ["waits", "done"] * 2
    monkeypatch.setattr(point, "_train", train)
    code, out, _ = study(tmp_path, "--jobs=1")
    assert code == 0 and "12 runs, 9 finished" in out
    _, listed, _ = study(tmp_path, "--list")
    assert states(listed) == ["done"] * 12
