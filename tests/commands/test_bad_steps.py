"""Training on data of which some are poison: it goes round them, or ends with an account."""

import os
import signal

import numpy as np
import pytest

from qkvjax.data.dataset import Dataset

FLAGS = (
    "--config.train.steps=40",
    "--config.train.log_every=1",
    "--config.train.checkpoint_every=5",
    "--config.train.eval_every=0",
)


@pytest.fixture
def poison(monkeypatch):
    """Makes the labels of some steps' data weigh nan; gives the list of steps that were read."""
    whole = Dataset.batch

    def use(*steps):
        read = []

        def batch(self, seed, step, *rest):
            read.append(step)
            found = whole(self, seed, step, *rest)
            if step in steps:
                found["weights"] = found["weights"] * np.float32("nan")
            return found

        monkeypatch.setattr(Dataset, "batch", batch)
        return read

    return use


def test_a_few_bad_steps_are_counted_and_gone_past(run_command, recipe, tmp_path, poison, lines):
    poison(0, 13, 14, 15)
    result = run_command("train", f"--config={recipe}", f"--workdir={tmp_path}", *FLAGS)
    assert result.code == 0 and "1 bad steps left out" in result.out and "rolled" not in result.out
    records = lines(tmp_path / "metrics.jsonl")
    bad = [record["step"] for record in records if record["train/bad_steps"]]
    assert bad == [1, 14, 15, 16] and not (tmp_path / "rollbacks.jsonl").exists()
    # Within bad steps none is saved, not even the fifth.
    assert "resumed" not in result.out


def test_who_asks_for_a_checkpoint_gets_it_among_bad_steps_too(
    run_command, recipe, tmp_path, poison, monkeypatch
):
    poison(*range(12, 17))
    poisoned = Dataset.batch

    def batch(self, seed, step, *rest):
        if step == 13:
            os.kill(os.getpid(), signal.SIGUSR1)
        return poisoned(self, seed, step, *rest)

    monkeypatch.setattr(Dataset, "batch", batch)
    result = run_command(
        "train",
        f"--config={recipe}",
        f"--workdir={tmp_path}",
        *FLAGS,
        "--config.train.keep_checkpoints=20",
    )
    assert result.code == 0, result.err
    saved = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert 15 not in saved and saved & {13, 14, 16, 17}


def test_many_in_a_row_go_back_and_leave_their_data_out(
    run_command, recipe, tmp_path, poison, lines
):
    read = poison(*range(12, 60))  # more than the run would have, without what follows
    result = run_command("train", f"--config={recipe}", f"--workdir={tmp_path}", *FLAGS)
    # From step 10 on, eight bad steps and the two before them are left out each time.
    assert result.code == 44, result.out
    assert "step 20, 8 bad steps in a row: back to step 10, the data of 10 steps left" in result.err
    assert result.err.count("back to step") == 3 and "Traceback" not in result.err
    account = lines(tmp_path / "rollbacks.jsonl")
    assert [(line["step"], line["to"], line["skip"]) for line in account] == [
        (20, 10, 10),
        (18, 10, 8),
        (18, 10, 8),
    ]
    assert max(read) < 60
    # The same command goes on, past what it was result to leave out.
    poison()
    result = run_command("train", f"--config={recipe}", f"--workdir={tmp_path}", *FLAGS)
    assert result.code == 0 and "resumed after step 10 of 40" in result.out
    steps = [record["step"] for record in lines(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, 41))  # none twice


def test_one_rollback_is_enough_for_one_bad_range(run_command, recipe, tmp_path, poison, lines):
    read = poison(*range(12, 25))
    result = run_command("train", f"--config={recipe}", f"--workdir={tmp_path}", *FLAGS)
    assert result.code == 0, result.err
    assert result.out.count("rolled back:") == 1 and "5 bad steps left out" not in result.out
    assert len(lines(tmp_path / "rollbacks.jsonl")) == 1
    assert max(read) == 39 + 10  # the run has all its steps, of later data
