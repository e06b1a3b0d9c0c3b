"""Evaluations while a run trains: saved first, stopped within a batch, made up for later."""

import os
import signal
import time

import pytest

from qkvjax.evaluation import evaluators

EACH = ("--config.train.eval_every=10", "--config.train.checkpoint_every=10")
TIMING = {"seconds", "tokens_per_second", "mfu"}


def without_timing(records):
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records]


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture
def score(monkeypatch):
    """Puts a function (plain score, model, dataset, **options) in place of the score."""
    plain = evaluators.SCORES["bits_per_byte"]

    def use(function):
        def instead(model, dataset, **options):
            return function(plain, model, dataset, **options)

        monkeypatch.setitem(evaluators.SCORES, "bits_per_byte", instead)

    yield use


def fails(plain, model, dataset, **options):
    raise RuntimeError("no memory for an evaluation")


def test_a_due_checkpoint_is_saved_before_its_evaluation(
    run_command, tied, tied_flags, tmp_path, lines, score, monkeypatch
):
    flags = [*tied_flags, f"--workdir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setitem(evaluators.SCORES, "bits_per_byte", lambda *a, **k: fails(None, *a, **k))
        with pytest.raises(RuntimeError, match="no memory"):
            run_command("train", *flags)
    assert saved(tmp_path) == [10]
    assert "eval/bits_per_byte" not in lines(tmp_path / "metrics.jsonl")[-1]
    # The next start makes up for the evaluation, and the lines are those of a straight run.
    again = run_command("train", *flags)
    assert again.code == 0 and "resumed after step 10 of 20" in again.out
    ours, straight = (lines(w / "metrics.jsonl") for w in (tmp_path, tied))
    assert without_timing(ours) == without_timing(straight)


def test_an_evaluation_that_fails_where_no_checkpoint_is_due_loses_nothing(
    run_command, tied_flags, tmp_path, score
):
    score(fails)
    flags = ["--config.train.eval_every=5", "--config.train.checkpoint_every=0"]
    with pytest.raises(RuntimeError, match="no memory"):
        run_command("train", *tied_flags, f"--workdir={tmp_path}", *flags)
    assert saved(tmp_path) == [5]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 42), (signal.SIGINT, 130)])
def test_a_signal_ends_an_evaluation_within_a_batch(
    run_command, tied, tied_flags, tmp_path, lines, score, number, code
):
    batches = []

    def slow(plain, model, dataset, pulse, **options):
        for _ in range(20):
            batches.append(1)
            if len(batches) == 3:
                os.kill(os.getpid(), number)
            pulse()
        return plain(model, dataset, pulse=pulse, **options)

    score(slow)
    flags = [*tied_flags, f"--workdir={tmp_path}"]
    stopped = run_command("train", *flags)
    assert stopped.code == code and len(batches) == 3
    assert "saved after step 10 of 20" in stopped.err and saved(tmp_path) == [10]
    again = run_command("train", *flags)
    assert again.code == 0
    ours, straight = (lines(w / "metrics.jsonl") for w in (tmp_path, tied))
    assert without_timing(ours) == without_timing(straight)


def test_who_asks_for_a_checkpoint_in_an_evaluation_gets_it_there(
    run_command, tied_flags, tmp_path, score
):
    seen = []

    def asks(plain, model, dataset, pulse, **options):
        if not seen:
            os.kill(os.getpid(), signal.SIGUSR1)
            pulse()
            seen.append(True)
        return plain(model, dataset, pulse=pulse, **options)

    score(asks)
    flags = ["--config.train.eval_every=5", "--config.train.checkpoint_every=0"]
    done = run_command("train", *tied_flags, f"--workdir={tmp_path}", *flags)
    assert done.code == 0 and saved(tmp_path) == [5, 20]


def test_the_time_limit_ends_an_evaluation(run_command, tied_flags, tmp_path, score, lines):
    def slow(plain, model, dataset, pulse, **options):
        time.sleep(2)
        pulse()
        raise AssertionError("the evaluation went on")

    score(slow)
    flags = [*tied_flags, f"--workdir={tmp_path}", "--config.train.eval_every=1"]
    done = run_command("train", *flags, "--config.train.max_seconds=1")
    assert done.code == 0 and "as train.max_seconds says" in done.out
    assert saved(tmp_path) == [lines(tmp_path / "metrics.jsonl")[-1]["step"]]


def test_a_last_evaluation_that_was_stopped_is_made_up_for(
    run_command, tied, tied_flags, tmp_path, score, lines, monkeypatch
):
    plain = evaluators.SCORES["bits_per_byte"]

    def stops(_, model, dataset, pulse, **options):
        if model_step() == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        pulse()
        return plain(model, dataset, pulse=pulse, **options)

    def model_step():
        return lines(tmp_path / "metrics.jsonl")[-1]["step"]

    score(stops)
    flags = [*tied_flags, f"--workdir={tmp_path}"]
    stopped = run_command("train", *flags)
    assert stopped.code == 42 and saved(tmp_path) == [10, 20]
    monkeypatch.setitem(evaluators.SCORES, "bits_per_byte", plain)
    again = run_command("train", *flags)
    assert again.code == 0
    ours, straight = (lines(w / "metrics.jsonl") for w in (tmp_path, tied))
    assert without_timing(ours) == without_timing(straight)
    assert "nothing left to train" in run_command("train", *flags).out


def test_best_and_every_nth_checkpoint_stay(run_command, tied_flags, tmp_path, score):
    scores = iter([3.0, 1.0, 2.0, 4.0])

    def scripted(plain, model, dataset, **options):
        return plain(model, dataset, **options) | {"bits_per_byte": next(scores)}

    score(scripted)
    flags = ["--config.train.eval_every=5", "--config.train.checkpoint_every=0"]
    flags += ["--config.train.keep_checkpoints=1", "--config.train.keep_best=True"]
    assert run_command("train", *tied_flags, f"--workdir={tmp_path / 'best'}", *flags).code == 0
    assert saved(tmp_path / "best") == [10, 20]
    flags = ["--config.train.eval_every=0", "--config.train.checkpoint_every=2"]
    flags += ["--config.train.keep_checkpoints=1", "--config.train.keep_every=5"]
    scores = iter([1.0])
    assert run_command("train", *tied_flags, f"--workdir={tmp_path / 'nth'}", *flags).code == 0
    assert saved(tmp_path / "nth") == [5, 10, 15, 20]


SLOW = """
import sys, time
from qkvjax.commands import cli
from qkvjax.evaluation import evaluators
plain = evaluators.SCORES["bits_per_byte"]

def slow(model, dataset, pulse, **options):
    for _ in range(6):
        time.sleep(1)
        pulse()
    return plain(model, dataset, pulse=pulse, **options)

evaluators.SCORES["bits_per_byte"] = slow
sys.exit(cli.main(["qkvjax", *sys.argv[1:]]))
"""


def test_an_evaluation_longer_than_stall_seconds_is_no_stall(process, recipe, tmp_path):
    done = process(
        "-c",
        SLOW,
        "train",
        f"--config={recipe}",
        "--config.train.steps=2",
        f"--workdir={tmp_path}",
        "--stall_seconds=4",
        "--init_seconds=120",
    )
    assert done.code == 0, done.err
