"""Studies of accuracy in several settings, beside the figures of a paper."""

import csv
import json
import math

import pytest
import simulated_study as simulated

from qkvjax.report import files
from qkvjax.report.by_setting import by_setting
from qkvjax.report.page import closing_lines, write_report
from qkvjax.report.summary import summarize

REFERENCE = {
    "source": "a paper",
    "metric": "accuracy",
    "values": {
        "sort d32": {"QKV": [0.975, 0.97, 0.98], "Q=K-V": [0.5, 0.6, 0.7], "(Q=K-V)+": [0.999]},
        "copy d32": {"QKV": [1.0], "Q=K-V": [1.0], "(Q=K-V)+": [0.996]},
    },
}


def summary_of(workdir):
    return summarize(files.read(workdir))


def test_a_setting_is_one_observation(tmp_path):
    summary = summary_of(simulated.accuracy_study(tmp_path))
    row = summary.variants.loc["Q=K-V"]
    assert summary.metric.key == "error" and summary.planned == 9
    assert row["units"] == 3 and row["pairs"] == 9
    assert row["difference"] == pytest.approx(0.08 * 2 / 3, abs=0.01)
    assert summary.relative(0.25) == 0.25  # points, not parts of an error


def test_other_settings_may_have_other_data(tmp_path):
    workdir = simulated.accuracy_study(tmp_path)
    write_report(workdir)
    assert "not comparable" not in (workdir / "report.md").read_text()
    text = (workdir / "results.jsonl").read_text()
    text = text.replace('"data_digest": "copy"', '"data_digest": "other"', 1)
    (workdir / "results.jsonl").write_text(text)
    write_report(workdir)
    assert "not comparable" in (workdir / "report.md").read_text()


def test_each_setting_stands_beside_the_reference(tmp_path):
    summary = summary_of(simulated.accuracy_study(tmp_path, reference=REFERENCE))
    parts = by_setting(summary)
    agreement = parts["agreement"]
    assert "overlap in 4 of 6 cells" in agreement and "above in 1 and below in 1" in agreement
    assert "a distance of 0.005 counts as equal" in agreement
    means, solved = parts["tables"]
    assert [row[0].text for row in means.rows] == [
        "sort (2 settings)",
        "copy",
        "all (3 settings)",
    ]
    assert means.rows[0][1].below == "0.975" and means.rows[1][2].text == "1.000"
    assert means.rows[0][2].below == "0.600"  # of the settings that both have
    assert solved.rows[0][1].text == "100\u00a0%" and solved.rows[0][2].text == "0\u00a0%"
    assert [len(table.rows) for _, table in parts["folds"]] == [2, 1]


def test_the_only_setting_stands_beside_its_reference(tmp_path):
    workdir = simulated.accuracy_study(tmp_path, ("",), reference=REFERENCE, setting="sort d32")
    parts = by_setting(summary_of(workdir))
    means = parts["tables"][0]
    assert means.rows[0][0].text == "sort" and means.rows[0][1].below == "0.975"
    assert "overlap in 1 of 3 cells" in parts["agreement"]


def test_how_many_learned_the_task_without_settings_or_reference(tmp_path):
    summary = summary_of(simulated.accuracy_study(tmp_path, ("",)))
    means, solved = by_setting(summary)["tables"]
    assert [cell.text for cell in solved.rows[0][1:]] == ["100\u00a0%", "0\u00a0%", "100\u00a0%"]


def test_class_accuracy_has_a_second_table(tmp_path):
    workdir = simulated.accuracy_study(tmp_path, ("",))
    lines = [json.loads(line) for line in open(workdir / "results.jsonl")]
    lines = [json.dumps(line | {"class_accuracy": 0.5}) + "\n" for line in lines]
    (workdir / "results.jsonl").write_text("".join(lines))
    tables = by_setting(summary_of(workdir))["tables"]
    assert len(tables) == 3 and tables[1].rows[0][1].text == "0.500"
    write_report(workdir)
    (first, *_) = csv.DictReader((workdir / "results.csv").open())
    assert first["class_accuracy"] == "0.5" and float(first["accuracy"]) > 0.9
    assert first["solved"] == "1.0"


@pytest.mark.parametrize(
    ("pads", "message"),
    [
        (
            True,
            "overlap in 1 of 2 cells (a cell is a variant in a setting; a distance of 1 % counts",
        ),
        (False, "Padding is not scored here and scored there: the figures do not compare."),
    ],
)
def test_perplexities_beside_a_reference(tmp_path, pads, message):
    """Single runs within one percent count as equal; padding must be scored in both or in none."""
    labels = {"QKV": {"model.sharing": "q-k-v"}, "Q-K=V": {"model.sharing": "q-k=v"}}
    perplexities = {"QKV": 5.15, "Q-K=V": 5.40}
    results = [
        simulated.result(label, labels[label], 0)
        | {"perplexity": perplexities[label], "score_pads": pads, "pad_fraction": 0.0}
        for label in labels
    ]
    reference = {
        "source": "a paper",
        "metric": "perplexity",
        "score_pads": True,
        "values": {"all": {"QKV": [5.11], "Q-K=V": [5.27]}},
    }
    study = simulated.study(labels, "QKV", [0]) | {"reference": reference}
    parts = by_setting(summary_of(simulated.write(tmp_path, study, results)))
    assert message in parts["agreement"]


def test_sizes_that_settings_change_are_not_given(tmp_path):
    workdir = simulated.accuracy_study(tmp_path)
    lines = [json.loads(line) for line in open(workdir / "results.jsonl")]
    for line in lines:
        line["costs"]["num_params"] += 1_000 * ("d64" in line["setting"])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "results.jsonl").write_text(text)
    row = summary_of(workdir).base
    assert math.isnan(row["num_params"]) and row["train_flops_per_token"] > 0


def test_the_report_speaks_of_errors(tmp_path):
    workdir = simulated.accuracy_study(tmp_path, reference=REFERENCE)
    write_report(workdir)
    text = (workdir / "report.md").read_text()
    assert "bits per byte" not in text
    assert "of the labels" in text and "3 settings" in text
    lines = list(csv.DictReader((workdir / "results.csv").open()))
    assert {line["metric"] for line in lines} == {"error"}
    assert "error" in "\n".join(closing_lines(workdir))
