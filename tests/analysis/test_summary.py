import csv
import json

import numpy as np
import pytest
import simulated_study as simulated

from qkvjax.analysis import curves, records
from qkvjax.analysis.summary import summarize, write_csv
from qkvjax.errors import UserError


def summary_of(workdir):
    return summarize(records.read(workdir))


def test_a_row_a_variant_with_exact_costs(tmp_path):
    summary = summary_of(simulated.sharing_study(tmp_path))
    assert [row.label for row in summary.rows] == ["QKV", "Q-K=V", "Q=K-V", "Q=V-K", "Q=K=V"]
    row = summary.rows[1]
    assert row.changed == {"model.sharing": "q-k=v"} and summary.baseline.changed == {}
    assert row.flops_per_token == 926_000_000 * 2 * 3 / 256
    assert summary.cache_saved(row) == 0.5
    scores = [line["score"] for line in row.results.values()]
    assert row.score.mean == pytest.approx(np.mean(scores))
    base = [line["score"] for line in summary.baseline.results.values()]
    assert row.paired.mean == pytest.approx(np.mean(np.subtract(scores, base)))
    assert row.train_validation_gap == pytest.approx(0.06)


def test_the_last_line_of_a_seed_counts(tmp_path):
    labels = {"A": {}, "B": {"seed": 1}}
    lines = [simulated.result("A", {}, 0), simulated.failed("B", {}, 0, "out of memory")]
    retried = simulated.result("B", {}, 0) | {"score": 1.25}
    workdir = simulated.write(tmp_path, simulated.study(labels, "A", [0]), [*lines, retried])
    row = summary_of(workdir).rows[1]
    assert row.scores == {0: 1.25} and not row.failed


def test_a_truncated_last_line_is_said_and_the_rest_is_read(tmp_path):
    summary = summary_of(simulated.sharing_study(tmp_path, tail='{"label": "QKV", "score": 1.'))
    assert len(summary.results) == 15
    assert any("cut short" in note for note in summary.notes)


@pytest.mark.parametrize("score", [None, float("nan"), float("inf"), "2.0"])
def test_a_score_that_is_no_number_is_a_failure(tmp_path, score):
    labels = {"A": {}}
    line = simulated.result("A", {}, 0) | {"score": score}
    workdir = simulated.write(tmp_path, simulated.study(labels, "A", [0]), [line])
    row = summary_of(workdir).baseline
    assert not row.results and "finite" in row.failed[0]


def test_lines_of_other_variants_and_other_data_are_said(tmp_path):
    labels = {"A": {}}
    lines = [
        simulated.result("A", {}, 0),
        simulated.result("A", {}, 1) | {"data_digest": "other"},
        simulated.result("gone", {}, 0),
    ]
    workdir = simulated.write(tmp_path, simulated.study(labels, "A", [0, 1]), lines)
    notes = " ".join(summary_of(workdir).notes)
    assert "left out" in notes and "not comparable" in notes


def test_a_folder_without_a_study_names_the_remedy(tmp_path):
    with pytest.raises(UserError, match="qkvjax study"):
        records.read(tmp_path)
    (tmp_path / "study.json").write_text('{"points": []}')
    with pytest.raises(UserError, match="baseline"):
        records.read(tmp_path)
    study = simulated.study({"A": {}}, "B", [0])
    with pytest.raises(UserError, match="'B' is none of the points A"):
        records.read(simulated.write(tmp_path, study, []))


def test_every_variant_reaches_the_common_losses(tmp_path):
    summary = summary_of(simulated.sharing_study(tmp_path))
    assert len(summary.marks) == 2 and summary.marks[0] > summary.marks[1]
    for row in summary.rows:
        assert all(0 < steps <= 1000 for steps in row.steps_to)
    worst = summary.rows[-1]
    assert worst.steps_to[0] == pytest.approx(500, abs=2)
    assert all(row.steps_to[0] < worst.steps_to[0] for row in summary.rows[:-1])


def test_reach_goes_straight_between_evaluations():
    steps, values = np.array([0.0, 100, 200]), np.array([5.0, 3.0, 2.0])
    assert curves.reach(steps, values, 4.0) == 50
    assert curves.reach(steps, values, 2.0) == 200
    assert curves.reach(steps, values, 1.9) is None
    assert curves.reach(steps, values, 6.0) == 0


def test_the_gap_is_paired_and_starts_after_the_first_step():
    def line(seed, gap):
        return {"curve": [{"step": s, "tokens": 10 * s, "seconds": s,
                           "bits_per_byte": (4 + seed) * (1 + gap * (s > 0))}
                          for s in (0, 1, 2)]}  # fmt: skip

    base = curves.curve({0: line(0, 0), 1: line(1, 0)}, "bits_per_byte")
    other = curves.curve({0: line(0, 0.1), 1: line(1, 0.1), 2: line(9, 0.5)}, "bits_per_byte")
    tokens, values = curves.gap(base, other)
    assert tokens.tolist() == [10, 20] and values.shape == (2, 2)
    assert values.mean(0) == pytest.approx([0.1, 0.1])
    assert curves.gap(base, None) is None


def test_csv_has_a_line_a_variant(tmp_path):
    workdir = simulated.sharing_study(tmp_path, fail={("q=k=v", s) for s in range(3)})
    summary = summary_of(workdir)
    write_csv(summary, tmp_path / "results.csv")
    lines = list(csv.DictReader(open(tmp_path / "results.csv", encoding="utf-8")))
    assert [line["model.sharing"] for line in lines] == list(simulated.SHARINGS)
    first, second, last = lines[0], lines[1], lines[-1]
    assert first["verdict"] == "baseline" and first["difference"] == ""
    assert float(second["difference"]) == pytest.approx(summary.rows[1].paired.mean)
    assert second["num_seeds"] == "3" and second["cache_bytes_per_token"] == "2048"
    assert second["decode_ratio"] == "0.951" and second["step_ratio"] == "0.962"
    assert last["verdict"] == "not run" and last["score"] == "" and last["num_seeds"] == "0"
    marks = [name for name in first if name.startswith("steps_to_")]
    assert len(marks) == 2 and all(float(first[name]) > 0 for name in marks)


def test_measurements_may_be_partial_or_broken(tmp_path):
    partial = simulated.measurements()
    partial["rows"] = partial["rows"][:1]
    assert not summary_of(simulated.sharing_study(tmp_path, measurements=partial)).rows[1].measured
    (tmp_path / "measurements.json").write_text(json.dumps(partial)[:40])
    summary = summary_of(tmp_path)
    assert not summary.baseline.measured and "unreadable" in " ".join(summary.notes)
