"""The answer must never say more than its intervals do."""

import re

import pytest
import simulated_study as simulated

from qkvjax import formats
from qkvjax.report import files
from qkvjax.report.answer import answer
from qkvjax.report.decisions import decisions
from qkvjax.report.summary import summarize


def words(workdir):
    parts = answer(summarize(files.read(workdir)))
    text = " ".join(f"{part.lead} {part.text}".strip() for part in parts)
    return text.replace(formats.NBSP, " ")


def choices(workdir):
    """Returns goal -> (choice, reason, whether it is decided)."""
    table = decisions(summarize(files.read(workdir)))
    rows = [] if table is None else table.rows
    return {
        goal.text: (choice.text, reason.text, choice.tone == "good")
        for goal, choice, reason in rows
    }


def generic(tmp_path, losses, seeds=5):
    labels = {label: {"optimizer.learning_rate": i} for i, label in enumerate(losses)}
    lines = [
        simulated.result(label, labels[label], seed, loss)
        for label, loss in losses.items()
        for seed in range(seeds)
    ]
    study = simulated.study(labels, next(iter(losses)), list(range(seeds)))
    return simulated.write(tmp_path, study, lines)


def equal_cache_study(tmp_path, loss, seeds=8):
    """Writes a study of QKV and two variants with half its cache: GQA-2, and Q-K=V, which loses
    `loss` more."""
    labels = {
        "QKV": {},
        "Q-K=V": {"model.sharing": "q-k=v"},
        "GQA-2": {"model.num_kv_heads": 2},
    }
    losses = {"QKV": 0.0, "Q-K=V": 0.005 + loss, "GQA-2": 0.005}
    lines = [
        simulated.result(label, labels[label], seed, losses[label])
        for label in labels
        for seed in range(seeds)
    ]
    for line in lines:
        line["costs"] = line["costs"] | {
            "cache_bytes_per_token": 4096 if line["label"] == "QKV" else 2048
        }
    return simulated.write(tmp_path, simulated.study(labels, "QKV", list(range(seeds))), lines)


def test_the_first_sentence_names_the_best_use_of_the_bytes(tmp_path):
    text = words(equal_cache_study(tmp_path, 0.03))
    assert text.startswith(
        "With 2 KiB of cache per token (half of QKV’s), GQA-2 is the best use of these bytes among"
        " the variants tried: it is better than Q-K=V by 0.0"
    )


def test_equal_bytes_that_are_not_separated_name_no_winner(tmp_path):
    text = words(equal_cache_study(tmp_path, 0.0))
    assert "this study does not separate GQA-2 and Q-K=V" in text and "best use" not in text


def test_a_shown_cost_comes_with_interval_and_cache(tmp_path):
    text = words(simulated.sharing_study(tmp_path, 12))
    assert re.search(
        r"Worse than QKV: Q-K=V \+\d.\d % \(\+\d.\d % to \+\d.\d %\), with 50 % less", text
    )
    assert "No difference from QKV shown: Q=V-K" in text
    assert "too small to tell" in text and "+2.2 % perplexity (+0.7 % of the bits)" in text
    assert "+3.1 % perplexity" in text and "+1.9 % of its bits" in text


def test_a_cache_size_that_one_variant_has_is_mentioned(tmp_path):
    text = words(simulated.sharing_study(tmp_path, 3, sharings=("q-k-v", "q-k=v")))
    assert "No other variant has the cache size of Q-K=V" in text and "equal_cache" in text


def test_one_seed_answers_nothing(tmp_path):
    text = words(simulated.sharing_study(tmp_path, 1))
    assert "This study cannot separate any variant from QKV: one seed does not show" in text
    assert "No interval, and therefore no verdict" in text and "at least three" in text
    for word in ("worse", "better", "Worse", "Better", "No difference"):
        assert word not in text.replace("whether these bytes have a better use", "")
    assert not any(
        decided for goal, (*_, decided) in choices(tmp_path).items() if "Fastest" not in goal
    )


def test_failed_variants_are_named_and_left_out(tmp_path):
    fail = {("q-k=v", seed) for seed in range(3)} | {("q=k-v", 1)}
    text = words(simulated.sharing_study(tmp_path, 3, fail=fail))
    assert "Q-K=V has no finished run" in text and "Q=K-V (2 of 3 finished)" in text


def test_a_failed_baseline_compares_nothing(tmp_path):
    text = words(simulated.sharing_study(tmp_path, 2, fail={("q-k-v", 0), ("q-k-v", 1)}))
    assert "baseline QKV has no finished run" in text
    assert choices(tmp_path) == {}


def test_only_a_baseline_and_no_run_at_all(tmp_path):
    assert "it is the only variant" in words(simulated.sharing_study(tmp_path, sharings=("q-k-v",)))
    study = simulated.study({"QKV": {}}, "QKV", [0])
    assert "No run has finished" in words(simulated.write(tmp_path / "none", study, []))


def test_a_study_of_something_else_speaks_of_its_own_labels(tmp_path):
    text = words(generic(tmp_path, {"small": 0.0, "large": -0.02, "huge": 0.03, "same": 0.0}))
    assert "Better than small: large" in text and "Worse than small: huge" in text
    assert "No difference from small shown: same" in text
    assert "projection" not in text and "perplexity" not in text and "cache" not in text
    assert choices(tmp_path)["Best quality"][0] == "large"
    assert not any("cache" in goal for goal in choices(tmp_path))  # every variant has the same


def test_two_copies_of_one_run_are_exactly_equal(tmp_path):
    labels = {"QKV": {}, "again": {}}
    lines = [simulated.result("QKV", {}, s) | {"label": name} for name in labels for s in (0, 1)]
    workdir = simulated.write(tmp_path, simulated.study(labels, "QKV", [0, 1]), lines)
    text = words(workdir)
    assert "again and QKV have exactly the same score in every run" in text
    assert choices(workdir)["Best quality"][0] == "not separable: identical scores"


def test_a_ceiling_is_named(tmp_path):
    """Of the settings, one is solved by all: half of the pairs are exactly equal."""
    text = words(simulated.accuracy_study(tmp_path, ("sort d32", "copy d32", "copy d64")))
    assert "The task has a ceiling." in text and "Q=K-V in 6 of 9" in text


@pytest.mark.parametrize("loss,choice", [(0.002, "Q-K=V"), (0.05, "QKV")])
def test_the_one_percent_decision_needs_the_whole_interval(tmp_path, loss, choice):
    labels = {"QKV": {}, "Q-K=V": {"model.sharing": "q-k=v"}}
    lines = []
    for seed in range(8):
        tied = simulated.result("Q-K=V", labels["Q-K=V"], seed, loss)
        tied["costs"]["cache_bytes_per_token"] //= 2
        lines += [simulated.result("QKV", {}, seed), tied]
    workdir = simulated.write(tmp_path, simulated.study(labels, "QKV", list(range(8))), lines)
    chosen, _, decided = choices(workdir)["At most 1 % loss, smallest cache"]
    assert chosen == choice and decided


def test_a_variant_with_exactly_half_of_the_cache_is_within_half_of_it(tmp_path):
    goal = f"At most 2{formats.NBSP}KiB of cache per token, best score"
    choice, _, decided = choices(equal_cache_study(tmp_path, 0.03))[goal]
    assert choice == "GQA-2" and decided


def test_a_straddled_margin_asks_for_more_seeds(tmp_path):
    workdir = simulated.sharing_study(tmp_path, 3)
    choice, reason, decided = choices(workdir)["At most 1 % loss, smallest cache"]
    assert not decided and re.fullmatch(r"not separable: needs about \d+ seeds", choice)
    assert "Q-K=V" in reason


@pytest.mark.parametrize(("low", "decided"), [(0.92, False), (0.921, True)])
def test_times_whose_intervals_touch_name_nobody(tmp_path, low, decided):
    measured = simulated.measurements()
    for row in measured["rows"]:
        if row["label"] != "QKV":
            fastest = row["label"] == "Q-K=V"
            row["step_ratio"] = [0.9, 0.88, 0.92] if fastest else [0.95, low, 0.98]
    table = choices(simulated.sharing_study(tmp_path, 2, measurements=measured))
    choice, _, is_decided = table["Fastest training step here"]
    assert is_decided == decided and ("more rounds" in choice) != decided


def test_overlapping_times_name_nobody(tmp_path):
    table = choices(simulated.sharing_study(tmp_path, 3))
    assert table["Fastest training step here"][0] == "Q=K=V"
    choice, _, decided = table["Fastest decoding here"]
    assert not decided and "more rounds" in choice
