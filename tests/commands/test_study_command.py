"""`study`: a grid trained, in processes or point by point, and its report."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

RECIPE = """
import ml_collections
from qkvjax import config as base
from qkvjax.sweep import axis

GRIDS = {
    "sharing": axis("model.sharing", ("q-k-v", "q-k=v")),
    "same": axis("train.log_every", (3, 2)),
    "missing": ({"label": "bad", "data.source": "text:/nowhere"}, {"label": "good"}),
    "diverging": ({}, {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0}),
    "illegal": ({}, {"model.num_heads": 3}),
    "misspelt": ({}, {"model.sharng": "q-k=v"}),
    "wrong_type": ({}, {"model.d_model": "wide"}),
    "seeded": ({}, {"seed": 3}),
    "twins": ({"label": "one"}, {"label": "one"}),
    "numbers": (1, 2),
    "numbered": ({"label": 3},),
    "grouped": ({"model": {"sharing": "q-k=v"}},),
    "unset": ({"model.sharing": None},),
    "none": (),
}

def get_config(arg=None):
    given = base.parse_arg(arg, grid="sharing", seeds=2)
    config = base.default()
    config.model.update(d_model=16, num_layers=1, num_heads=2, mlp_ratio=1.0)
    config.data.update(source="text:CORPUS", seq_len=16, batch_size=4)
    config.train.update(steps=6, log_every=3, eval_every=3, checkpoint_every=6)
    config.evals.eval.max_labels = 300
    config.study = ml_collections.ConfigDict(
        {"title": "Tiny", "points": GRIDS[given.grid], "seeds": given.seeds, "prompt": "the "}
    )
    return config
"""


@pytest.fixture(scope="module")
def grid(folders, corpus):
    path = folders / "grid.py"
    path.write_text(RECIPE.replace("CORPUS", str(corpus)))
    return path


@pytest.fixture(scope="module")
def study(run_command, grid):
    """study(workdir, *flags, grid="sharing"): the command with a grid of the recipe."""

    def run(workdir, *flags, points="sharing"):
        return run_command(
            "study", f"--config={grid}:grid={points}", f"--workdir={workdir}", *flags
        )

    return run


@pytest.fixture(scope="module")
def two_jobs(process, grid, folders):
    """The first seed trained by processes, two at a time: (workdir, what was result)."""
    workdir = folders / "two_jobs"
    flags = [f"--config={grid}:seeds=1", f"--workdir={workdir}", "--jobs=2"]
    return workdir, process("-m", "qkvjax", "study", *flags)


@pytest.fixture(scope="module")
def by_points(study, folders):
    """Both seeds, one --point after another in this process."""
    workdir = folders / "by_points"
    for point in (2, 0, 3, 1):
        assert study(workdir, f"--point={point}").code == 0
    assert study(workdir, "--report_only").code == 0
    return workdir


def scores(workdir, lines):
    return {(r["label"], r["seed"]): r["score"] for r in lines(workdir / "results.jsonl")}


def table(workdir):
    with open(workdir / "results.csv") as file:
        return {row["label"]: row for row in csv.DictReader(file)}


def test_what_a_study_leaves(by_points, lines):
    records = lines(by_points / "results.jsonl")
    assert [(r["label"], r["seed"]) for r in records] == [
        ("QKV", 1),
        ("QKV", 0),
        ("Q-K=V", 1),
        ("Q-K=V", 0),
    ]
    for record in records:
        assert record["status"] == "done" and record["steps"] == 6
        assert record["score"] == record["curve"][-1]["bits_per_byte"]
        assert [point["step"] for point in record["curve"]] == [3, 6]
        assert (by_points / record["workdir"] / "checkpoints" / "6").is_dir()
    rows = table(by_points)
    assert list(rows) == ["QKV", "Q-K=V"]
    assert rows["QKV"]["verdict"] == "baseline"
    assert rows["Q-K=V"]["verdict"] in ("better", "worse", "no difference shown")
    assert rows["Q-K=V"]["num_seeds"] == "2"
    markdown = (by_points / "report.md").read_text()
    assert "Q-K=V" in markdown and rows["Q-K=V"]["verdict"] in markdown


def test_processes_score_as_points_do(two_jobs, by_points, lines):
    workdir, result = two_jobs
    assert result.code == 0, result.err
    assert not [line for line in result.err.splitlines() if "Traceback" in line]
    assert "about" in result.out and "[2/2]" in result.out
    assert f"report: {(workdir / 'report.html').resolve()}" in result.out
    expected = {key: score for key, score in scores(by_points, lines).items() if key[1] == 0}
    assert scores(workdir, lines) == expected


def test_times_and_memory_are_measured(two_jobs):
    workdir, result = two_jobs
    progress = [line for line in result.out.splitlines() if line.startswith("  compiled ")]
    assert progress == [
        "  compiled QKV, 1 of 2",
        "  compiled Q-K=V, 2 of 2; timing all of them side by side",
    ]
    measured = json.loads((workdir / "measurements.json").read_text())
    assert measured["labels"] == ["QKV", "Q-K=V"]
    rows = {row["label"]: row for row in measured["rows"]}
    assert rows["QKV"]["step_ratio"] == [1, 1, 1]
    low, high = rows["Q-K=V"]["step_ratio"][1:]
    assert 0 < low < high and rows["Q-K=V"]["peak_bytes"] > 0


def test_the_report_is_one_file(by_points):
    page = (by_points / "report.html").read_text()
    loads = re.findall(r"""(?:src|srcset|href|data|poster|action)\s*=\s*["']([^"'#][^"']*)""", page)
    links = set(re.findall(r"""<a\s[^>]*href=["']([^"']*)""", page))
    assert not [at for at in loads if at not in links and not at.startswith("data:")]
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:|#)", page)
    assert "<script src" not in page and "<svg" in page and "Q-K=V" in page


@pytest.mark.slow
def test_one_process_at_a_time_scores_the_same(study, by_points, folders, lines):
    workdir = folders / "one_job"
    assert study(workdir, "--jobs=1").code == 0
    assert scores(workdir, lines) == scores(by_points, lines)


def test_the_runs_of_a_seed_are_paired(by_points):
    """Both variants of a seed read the same batches in the same order, other seeds others."""
    from qkvjax import config as configs
    from qkvjax.training.run import prepare_run

    batches = {}
    for folder in (by_points / "runs").iterdir():
        run = prepare_run(configs.load(folder / "config.json"), log=lambda line: None)
        first = [np.asarray(run.batch(step)["inputs"]).tobytes() for step in range(6)]
        batches.setdefault(run.config.seed, []).append(first)
    assert len(batches[0]) == len(batches[1]) == 2
    assert batches[0][0] == batches[0][1] != batches[1][0] == batches[1][1]


def test_a_finished_study_trains_nothing(study, by_points, copy, checksums):
    workdir = copy(by_points)
    before = checksums(workdir)
    result = study(workdir)
    assert result.code == 0 and "all 4 runs are finished" in result.out
    after = checksums(workdir)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert all(name.startswith(("report", "plots/", "study.json", ".lock")) for name in changed)
    again = study(workdir, "--point=1")
    assert again.code == 0 and "is finished" in again.out


def test_list_says_what_is_done(study, by_points, tmp_path):
    result = study(by_points, "--list")
    assert result.code == 0 and result.out.count(" done ") == 4
    result = study(tmp_path, "--list")
    rows = result.out.splitlines()[-4:]
    assert [row.split()[:3] for row in rows] == [
        ["0", "-", "0"],
        ["1", "-", "0"],
        ["2", "-", "1"],
        ["3", "-", "1"],
    ]
    assert not list(tmp_path.iterdir())


def test_equals_show_no_difference(study, in_process, tmp_path, lines):
    """An A/A study: what changes nothing measures exactly nothing."""
    result = study(tmp_path, "--jobs=1", points="same")
    assert result.code == 0, result.err
    found = scores(tmp_path, lines)
    assert len(found) == 4
    first, second = dict.fromkeys(label for label, _ in found)
    assert all(found[first, seed] == found[second, seed] for seed in (0, 1))
    row = table(tmp_path)[second]
    assert row["verdict"] == "no difference shown"
    assert float(row["difference"]) == float(row["difference_low"]) == 0
    assert "no difference shown" in (tmp_path / "report.md").read_text()


def test_a_failed_point_is_recorded_and_the_others_go_on(
    study, in_process, tmp_path, lines, corpus, grid
):
    result = study(tmp_path, "--jobs=2", points="missing")
    assert result.code == 0 and "2 runs failed" in result.out
    records = lines(tmp_path / "results.jsonl")
    assert sorted((r["label"], r["status"]) for r in records) == [
        ("bad", "failed"),
        ("bad", "failed"),
        ("good", "done"),
        ("good", "done"),
    ]
    failed = [r for r in records if r["status"] == "failed"]
    assert all("nothing is at /nowhere" in r["error"] for r in failed)
    assert "nothing is at /nowhere" in (tmp_path / "report.md").read_text()
    listed = study(tmp_path, "--list", points="missing").out
    assert listed.count(" failed ") == 2 and listed.count(" done ") == 2
    again = study(tmp_path, "--point=0", points="missing")  # tried again, not skipped
    assert again.code == 2 and "nothing is at /nowhere" in again.err


def test_a_killed_process_is_recorded(study, in_process, tmp_path, lines, monkeypatch):
    from qkvjax.studies import processes

    start = processes.start_run
    kill = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"

    def killed_once(study, task, *how):
        if task.number == 0:
            return subprocess.Popen([sys.executable, "-c", kill])
        return start(study, task, *how)

    monkeypatch.setattr(processes, "start_run", killed_once)
    result = study(tmp_path, "--jobs=2", "--config.study.seeds=1")
    assert result.code == 0 and "1 runs failed" in result.out
    by_label = {r["label"]: r for r in lines(tmp_path / "results.jsonl")}
    assert by_label["QKV"]["status"] == "failed" and "code -9" in by_label["QKV"]["error"]
    assert by_label["Q-K=V"]["status"] == "done"
    monkeypatch.setattr(processes, "start_run", start)
    result = study(tmp_path, "--jobs=2", "--config.study.seeds=1")
    assert result.code == 0 and "2 runs, 1 finished" in result.out
    assert [r["status"] for r in lines(tmp_path / "results.jsonl")].count("done") == 2
    assert table(tmp_path)["QKV"]["num_seeds"] == "1"


def test_a_diverged_run_is_a_failure(study, tmp_path, lines):
    result = study(tmp_path, "--point=1", points="diverging")
    assert result.code == 44 and "lower optimizer.learning_rate" in result.err
    (record,) = lines(tmp_path / "results.jsonl")
    assert record["status"] == "failed" and "diverged" in record["error"]


def test_a_study_without_a_finished_run_is_no_success(study, in_process, tmp_path):
    result = study(tmp_path, "--jobs=1", "--config.data.seq_len=100000")
    assert result.code == 2
    flags = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0.0"]
    result = study(tmp_path / "diverging", "--jobs=1", "--config.study.seeds=1", *flags)
    assert result.code == 2 and "no run has finished: 2 runs failed" in result.err
    assert (tmp_path / "diverging/report.html").exists()


def test_sigterm_ends_the_runs_of_a_study(grid, tmp_path):
    """None is left to train on in a workdir that the next start will use."""
    command = [sys.executable, "-m", "qkvjax", "study", f"--config={grid}", f"--workdir={tmp_path}"]
    flags = ["--jobs=1", "--config.train.steps=1000000"]
    parent = subprocess.Popen([*command, *flags], stdout=-1, stderr=-1)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
    second = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert second.returncode == 2 and "another process is at work" in second.stderr
    parent.terminate()
    assert parent.wait(timeout=60) == 143
    assert b"Traceback" not in parent.stderr.read()
    assert (
        str(tmp_path) not in subprocess.run(["ps", "axww"], capture_output=True, text=True).stdout
    )


def test_max_seconds_starts_no_run_that_would_end_late(study, in_process, tmp_path):
    began = time.monotonic()
    result = study(tmp_path, "--jobs=1", "--max_seconds=0")
    assert result.code == 0 and "left no time for 4 runs" in result.out
    assert time.monotonic() - began < 60 and not (tmp_path / "results.jsonl").exists()


def test_a_torn_line_of_results_is_trained_again(study, by_points, copy, lines):
    workdir = copy(by_points)
    results = workdir / "results.jsonl"
    whole = results.read_text().splitlines()
    results.write_text("\n".join(whole[:3]) + "\n" + whole[3][:100])
    assert study(workdir, "--list").out.count(" done ") == 3
    assert study(workdir, "--report_only").code == 0
    assert study(workdir, "--point=1").code == 0  # what was torn; the run itself is there
    assert scores(workdir, lines) == scores(by_points, lines)


def test_another_base_is_refused(study, by_points, checksums):
    before = checksums(by_points)
    result = study(by_points, "--point=0", "--config.optimizer.b1=0.8", "--config.seed=1")
    assert result.code == 2 and "has runs of a study with another base" in result.err
    assert "optimizer.b1: 0.9 -> 0.8" in result.err and "seed: 0 -> 1" in result.err
    assert checksums(by_points) == before


@pytest.mark.parametrize(
    ("points", "flags", "message"),
    [
        ("illegal", [], "point 'num_heads=3' is not a valid.*does not divide d_model=16"),
        ("misspelt", [], "point 'sharng=q-k=v'.*did you mean 'model.sharing'"),
        ("wrong_type", [], "point 'd_model=wide'.*is not of type int"),
        ("seeded", [], "sets `seed`: study.seeds"),
        ("numbered", [], "field names and label must be strings"),
        ("grouped", [], "'model' is not a field"),
        ("unset", [], "point .* is not a valid configuration"),
        ("sharing", ["--config.study.seeds=99999999999"], "at most 10,000"),
        ("twins", [], "two points of the grid are called 'one': give labels"),
        ("numbers", [], "is not a grid: make it with qkvjax.sweep"),
        ("none", [], "has no grid.*configs/quickstart.py"),
        ("sharing", ["--point=4"], "--point=4 is not one of 0 to 3: see --list"),
        ("sharing", ["--jobs=0"], "--jobs=0: 0 is not a positive integer"),
        ("sharing", ["--config.study.seeds=0"], "study.seeds=0 must be at least 1"),
        ("sharing", ["--config.study.sedes=3"], "did you mean 'study.seeds'"),
        ("sharing", ["--config.evals.eval.kind=f1"], "'f1' is not one of bits_per_byte"),
    ],
)
def test_bad_grids(study, tmp_path, lines, points, flags, message):
    result = study(tmp_path, *flags, points=points)
    assert result.code == 2 and result.err.count("error:") == 1
    assert re.search(message, result.err), result.err
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("name", ["study.json", "measurements.json"])
def test_damaged_json_is_told_with_its_path(study, by_points, copy, name):
    workdir = copy(by_points)
    (workdir / name).write_text('{"config": ')
    result = study(workdir, "--point=0")
    assert result.code == 2 and name in result.err and "delete it" in result.err


@pytest.mark.parametrize(
    ("jobs", "message", "visible"),
    [
        ("--jobs=2", "4 runs, 2 at a time", {"4", "6"}),
        ("--jobs=9", "--jobs=9: 2 devices are here, so 2 runs at a time", {"4", "6"}),
        ("--jobs=1", "1 of 2 devices is used.*mesh.fsdp=-1.*qkvjax study --jobs=2", {None}),
    ],
)
def test_each_run_at_a_time_sees_its_own_gpu(study, tmp_path, monkeypatch, jobs, message, visible):
    """The environment of the processes, which end at once here, on a machine with two GPUs."""
    from qkvjax.studies import devices, measurements, processes

    started = []

    class Process:
        """Runs until it is polled twice, and fails."""

        def __init__(self, command, env, **options):
            self.gpu, self.returncode, self.polls = env.get("CUDA_VISIBLE_DEVICES"), 1, 0
            beside = [other.gpu for other in started if other.polls < 2]
            assert self.gpu not in beside
            started.append(self)

        def poll(self):
            self.polls += 1
            return self.returncode if self.polls > 1 else None

    monkeypatch.setattr(devices, "find", lambda: devices.Devices("cuda", ("4", "6")))
    monkeypatch.setattr(measurements, "read_or_measure", lambda *arguments: {})
    monkeypatch.setattr(processes.subprocess, "Popen", Process)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.0)
    result = study(tmp_path, jobs)
    assert re.search(message, result.out), result.out + result.err
    assert len(started) == 4 and {process.gpu for process in started} == visible


def test_the_slots_are_pinned_to_cores(two_jobs):
    """Each run wrote which processors it could use."""
    workdir, _ = two_jobs
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")
    for file in (workdir / "runs").glob("*/run.json"):
        assert json.loads(file.read_text())["environment"]["cpu_count"] == 1
