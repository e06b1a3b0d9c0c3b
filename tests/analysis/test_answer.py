"""The answer must never say more than its intervals do."""

import re

import pytest
import simulated_study as simulated

from qkvjax.analysis import formats, records
from qkvjax.analysis.answer import answer
from qkvjax.analysis.decisions import decisions
from qkvjax.analysis.summary import summarize


def words(workdir):
    summary = summarize(records.read(workdir))
    text = " ".join("".join(paragraph) for paragraph in answer(summary))
    return text.replace(formats.NBSP, " ")


def choices(workdir):
    return {d.wish: d for d in decisions(summarize(records.read(workdir)))}


def generic(tmp_path, losses, seeds=5):
    labels = {label: {"optimizer.learning_rate": i} for i, label in enumerate(losses)}
    lines = [
        simulated.result(label, labels[label], seed, loss)
        for label, loss in losses.items()
        for seed in range(seeds)
    ]
    study = simulated.study(labels, next(iter(losses)), list(range(seeds)))
    return simulated.write(tmp_path, study, lines)


def test_a_shown_cost_is_said_with_interval_and_cache(tmp_path):
    text = words(simulated.sharing_study(tmp_path, 12))
    assert "share a projection cost quality here" in text
    assert re.search(r"\+0\.0\d+ bits per byte \(95 % interval \+0\.0\d+ to \+0\.0\d+, 12", text)
    assert "50 % smaller: 2 KiB a token instead of 4 KiB" in text
    assert "No difference from QKV shown: Q=V-K" in text
    assert "too small to tell" in text and "+2.2 % perplexity (+0.7 % of the bits)" in text
    assert "+3.1 % perplexity" in text and "+1.9 % of its bits" in text


def test_an_interval_around_zero_is_no_finding_either_way(tmp_path):
    text = words(simulated.sharing_study(tmp_path, 2))
    assert "not to say that there is none" in text and "cost quality" not in text
    assert "Worse" not in text and "Better" not in text


def test_one_seed_answers_nothing(tmp_path):
    text = words(simulated.sharing_study(tmp_path, 1))
    assert text.startswith("This run cannot say whether three projections are needed")
    assert "Without an interval, so without a verdict" in text and "at least three" in text
    for word in ("worse", "better", "Worse", "Better", "No difference"):
        assert word not in text
    assert not any(d.decided for w, d in choices(tmp_path).items() if "Fastest" not in w)


def test_failed_variants_are_named_and_left_out(tmp_path):
    fail = {("q-k=v", seed) for seed in range(3)} | {("q=k-v", 1)}
    text = words(simulated.sharing_study(tmp_path, 3, fail=fail))
    assert "Q-K=V has no finished run" in text and "Q=K-V (2 of 3)" in text
    assert "Q-K=V differs" not in text


def test_a_failed_baseline_compares_nothing(tmp_path):
    text = words(simulated.sharing_study(tmp_path, 2, fail={("q-k-v", 0), ("q-k-v", 1)}))
    assert "baseline QKV has no finished run" in text
    assert choices(tmp_path) == {}


def test_only_a_baseline_and_no_run_at_all(tmp_path):
    assert "it ran alone" in words(simulated.sharing_study(tmp_path, sharings=("q-k-v",)))
    study = simulated.study({"QKV": {}}, "QKV", [0])
    assert "No run has finished" in words(simulated.write(tmp_path / "none", study, []))


def test_a_generic_study_speaks_of_its_own_labels(tmp_path):
    text = words(generic(tmp_path, {"small": 0.0, "large": -0.02, "huge": 0.03, "same": 0.0}))
    assert "Of 3 variants compared with small: 1 better, 1 worse and 1 with no" in text
    assert "projection" not in text and "perplexity" not in text
    found = choices(tmp_path)
    assert found["Best quality"].choice == "large"
    assert not any("cache" in wish for wish in found)  # every variant has the same


def test_two_copies_of_one_run_are_exactly_equal(tmp_path):
    labels = {"QKV": {}, "again": {}}
    lines = [simulated.result("QKV", {}, s) | {"label": name} for name in labels for s in (0, 1)]
    workdir = simulated.write(tmp_path, simulated.study(labels, "QKV", [0, 1]), lines)
    text = words(workdir)
    assert "again and QKV agree in every seed" in text and "A/A" in text
    assert choices(workdir)["Best quality"].choice == "not separable: identical scores"


@pytest.mark.parametrize("loss,choice", [(0.002, "Q-K=V"), (0.05, "QKV")])
def test_the_one_percent_decision_needs_the_whole_interval(tmp_path, loss, choice):
    labels = {"QKV": {}, "Q-K=V": {"model.sharing": "q-k=v"}}
    lines = []
    for seed in range(8):
        tied = simulated.result("Q-K=V", labels["Q-K=V"], seed, loss)
        tied["costs"]["cache_bytes_per_token"] //= 2
        lines += [simulated.result("QKV", {}, seed), tied]
    workdir = simulated.write(tmp_path, simulated.study(labels, "QKV", list(range(8))), lines)
    found = choices(workdir)["At most 1 % loss, smallest cache"]
    assert found.choice == choice and found.decided


def test_a_straddled_margin_asks_for_more_seeds(tmp_path):
    found = choices(simulated.sharing_study(tmp_path, 3))["At most 1 % loss, smallest cache"]
    assert not found.decided and re.fullmatch(r"not separable: about \d+ more seeds", found.choice)
    assert "Q-K=V" in found.reason


def test_overlapping_times_name_nobody(tmp_path):
    found = choices(simulated.sharing_study(tmp_path, 3))
    assert found["Fastest training step here"].choice == "Q=K=V"
    assert not found["Fastest decoding here"].decided
    assert "more rounds" in found["Fastest decoding here"].choice
