"""Summaries: a row for each variant, frames of runs and curves, results.csv."""

import csv
import json

import numpy as np
import pytest
import simulated_study as simulated

import qkvjax
from qkvjax.errors import UserError
from qkvjax.report import files, results
from qkvjax.report.csv_file import write_csv
from qkvjax.report.summary import summarize


def summary_of(workdir):
    return summarize(files.read(workdir))


def test_a_row_a_variant_with_exact_costs(tmp_path):
    summary = summary_of(simulated.sharing_study(tmp_path))
    assert list(summary.variants.index) == ["QKV", "Q-K=V", "Q=K-V", "Q=V-K", "Q=K=V"]
    assert summary.changes["Q-K=V"] == {"model.sharing": "q-k=v"}
    assert summary.changes["QKV"] == {}
    row = summary.variants.loc["Q-K=V"]
    assert row["train_flops_per_token"] == 926_000_000 * 2 * 3 / 256
    assert summary.cache_saved("Q-K=V") == 0.5
    scores = summary.done.set_index(["label", "seed"])["score"]
    assert row["score"] == pytest.approx(scores["Q-K=V"].mean())
    assert row["difference"] == pytest.approx((scores["Q-K=V"] - scores["QKV"]).mean())
    assert row["gap"] == pytest.approx(0.06)


def test_the_last_line_of_a_seed_counts(tmp_path):
    labels = {"A": {}, "B": {"seed": 1}}
    lines = [simulated.result("A", {}, 0), simulated.failed("B", {}, 0, "out of memory")]
    retried = simulated.result("B", {}, 0) | {"score": 1.25}
    workdir = simulated.write(tmp_path, simulated.study(labels, "A", [0]), [*lines, retried])
    row = summary_of(workdir).variants.loc["B"]
    assert row["score"] == 1.25 and row["num_runs"] == 1 and row["num_failed"] == 0


def test_a_truncated_last_line_gives_a_note_and_the_rest_is_read(tmp_path):
    summary = summary_of(simulated.sharing_study(tmp_path, tail='{"label": "QKV", "score": 1.'))
    assert len(summary.done) == 15
    assert any("cut short" in note for note in summary.files.notes)


@pytest.mark.parametrize("score", [None, float("nan"), float("inf"), "2.0"])
def test_a_score_that_is_not_a_number_is_a_failure(tmp_path, score):
    line = simulated.result("A", {}, 0) | {"score": score}
    workdir = simulated.write(tmp_path, simulated.study({"A": {}}, "A", [0]), [line])
    summary = summary_of(workdir)
    assert not len(summary.done) and summary.base["num_failed"] == 1
    assert "finite" in summary.runs["error"].iloc[0]


def test_lines_of_other_variants_give_a_note(tmp_path):
    lines = [simulated.result("A", {}, 0), simulated.result("gone", {}, 0)]
    workdir = simulated.write(tmp_path, simulated.study({"A": {}}, "A", [0, 1]), lines)
    assert "leaves out lines" in " ".join(summary_of(workdir).files.notes)


def test_a_folder_without_a_study_names_the_remedy(tmp_path):
    with pytest.raises(UserError, match="qkvjax study"):
        files.read(tmp_path)
    (tmp_path / "study.json").write_text('{"points": []}')
    with pytest.raises(UserError, match="baseline"):
        files.read(tmp_path)
    study = simulated.study({"A": {}}, "B", [0])
    with pytest.raises(UserError, match="'B' is not one of the points A"):
        files.read(simulated.write(tmp_path, study, []))


def test_csv_has_a_line_a_variant(tmp_path):
    workdir = simulated.sharing_study(tmp_path, fail={("q=k=v", s) for s in range(3)})
    summary = summary_of(workdir)
    write_csv(summary, tmp_path / "results.csv")
    lines = list(csv.DictReader(open(tmp_path / "results.csv", encoding="utf-8")))
    assert [line["model.sharing"] for line in lines] == list(simulated.SHARINGS)
    first, second, last = lines[0], lines[1], lines[-1]
    assert first["verdict"] == "baseline" and first["difference"] == ""
    assert float(second["difference"]) == pytest.approx(summary.variants["difference"].iloc[1])
    assert second["num_seeds"] == "3" and second["cache_bytes_per_token"] == "2048"
    assert second["decode_ratio"] == "0.951" and second["step_ratio"] == "0.962"
    assert last["verdict"] == "not run" and last["score"] == "" and last["num_seeds"] == "0"


def test_measurements_may_be_partial_or_broken(tmp_path):
    partial = simulated.measurements()
    partial["rows"] = partial["rows"][:1]
    summary = summary_of(simulated.sharing_study(tmp_path, measurements=partial))
    assert summary.variants["step_ratio"].iloc[0] and not summary.variants["step_ratio"].iloc[1]
    (tmp_path / "measurements.json").write_text(json.dumps(partial)[:40])
    summary = summary_of(tmp_path)
    assert summary.variants["step_ratio"].isna().all()
    assert "unreadable" in " ".join(summary.files.notes)


def test_variants_of_one_cache_size_are_compared_with_their_best(tmp_path):
    workdir = simulated.sharing_study(tmp_path, 12)
    (group,) = summary_of(workdir).equal_cache()
    assert list(group.index) == ["Q-K=V", "Q=K=V"] and set(group["cache_bytes_per_token"]) == {2048}
    assert np.isnan(group["difference"].iloc[0]) and group["verdict"].iloc[1] == "worse"


def test_results_are_a_tidy_frame(tmp_path):
    """A row a run: what was overridden, scores, costs, digests, failures."""
    frame = qkvjax.results(simulated.sharing_study(tmp_path, fail={("q=k-v", 1)}))
    assert len(frame) == 15 and frame.index.tolist() == list(range(15))
    assert frame["label"].unique().tolist() == ["QKV", "Q-K=V", "Q=K-V", "Q=V-K", "Q=K=V"]
    assert frame.loc[frame["label"] == "Q-K=V", "model.sharing"].unique() == ["q-k=v"]
    assert frame.loc[frame["label"] == "Q=K=V", "cache_bytes_per_token"].unique() == [2048]
    failed = frame[frame["status"] == "failed"]
    assert len(failed) == 1 and failed["score"].isna().all() and failed["error"].notna().all()
    for name in ("perplexity", "num_labels", "tokens", "data_digest", "num_params", "seconds"):
        assert frame.loc[frame["status"] == "done", name].notna().all(), name
    assert frame["score"].dtype == float
    assert not set(frame.columns) & set(results.NESTED)


def test_curves_have_a_row_an_evaluation(tmp_path):
    frame = qkvjax.curves(simulated.sharing_study(tmp_path))
    assert len(frame) == 15 * 11
    last = frame[(frame["label"] == "QKV") & (frame["seed"] == 0)].iloc[-1]
    assert last["step"] == 1000 and last["tokens"] == 4_096_000
    whole = qkvjax.results(tmp_path)
    score = whole[(whole["label"] == "QKV") & (whole["seed"] == 0)]["score"].item()
    assert last["bits_per_byte"] == score


def test_an_unfinished_study_has_frames(tmp_path):
    workdir = simulated.write(tmp_path, simulated.study({"A": {}}, "A", [0]), [])
    assert not len(qkvjax.results(workdir)) and not len(qkvjax.curves(workdir))


def with_items(workdir, num_items=40, spread=0.02):
    """Gives every run of a study items; the score of a run is that of its items."""
    rng = np.random.default_rng(0)
    hard = rng.normal(2, 0.4, num_items)
    weight = rng.integers(100, 900, num_items)
    gaps = {"QKV": 0.0, "Q-K=V": 0.1}
    lines = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    for line in lines:
        gap = gaps.get(line["label"], 0.2) * rng.normal(1, spread, num_items)
        folder = workdir / line["workdir"] / "items"
        folder.mkdir(parents=True)
        value = (hard + gap) * weight
        np.savez(folder / "eval.npz", item=np.arange(num_items), value=value, weight=weight)
    return workdir


def test_items_give_the_interval_over_the_test_set(tmp_path):
    workdir = with_items(simulated.sharing_study(tmp_path, 3))
    items = summary_of(workdir).items
    assert set(items["num_items"]) == {40} and len(items) == 4
    row = items.loc["Q-K=V"]
    assert row["low"] < 0.1 < row["high"] and row["difference"] == pytest.approx(0.1, abs=0.01)


def test_items_of_some_runs_give_no_interval(tmp_path):
    workdir = with_items(simulated.sharing_study(tmp_path, 3))
    next(workdir.glob("runs/QKV-0/items/eval.npz")).unlink()
    assert not len(summary_of(workdir).items)


def test_tuning_runs_are_not_compared(tmp_path):
    labels = {"QKV": {}, "Q-K=V": {"model.sharing": "q-k=v"}}
    lines = []
    for label, overrides in labels.items():
        for value in (0.001, 0.002):
            tuned = {"phase": "tune", "tuned": value}
            lines.append(simulated.result(label, overrides, 100, 5 * value) | tuned)
        chosen = {"phase": "compare", "tuned": 0.001}
        lines += [simulated.result(label, overrides, seed) | chosen for seed in (0, 1, 2)]
    study = simulated.study(labels, "QKV", [0, 1, 2])
    field = {"field": "optimizer.learning_rate", "values": [0.001, 0.002], "seeds": [100]}
    summary = summary_of(simulated.write(tmp_path, study | {"tuned": field}, lines))
    assert set(summary.done["seed"]) == {0, 1, 2} and len(summary.runs) == 10
    assert set(summary.curves["seed"]) == {0, 1, 2}


def test_scores_of_two_kinds_are_refused(tmp_path):
    workdir = simulated.accuracy_study(tmp_path)
    text = (workdir / "results.jsonl").read_text()
    (workdir / "results.jsonl").write_text(
        text.replace('"metric": "error"', '"metric": "bits_per_byte"', 1)
    )
    with pytest.raises(UserError, match="mixes the scores bits_per_byte, error"):
        summary_of(workdir)
