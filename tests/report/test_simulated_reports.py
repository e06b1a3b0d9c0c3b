"""Simulated results through the whole report: what results.csv and the page say about them."""

import csv
import math

import numpy as np
import pytest
import simulated_study as simulated

from qkvjax.report import files
from qkvjax.report.csv_file import write_csv
from qkvjax.report.page import write_report
from qkvjax.report.summary import summarize


def study_of(workdir, scores):
    """Writes a study with scores [variants, settings, seeds]; variant v0 is the baseline."""
    variants, settings, seeds = scores.shape
    labels = {f"v{i}": {"optimizer.learning_rate": i} for i in range(variants)}
    names = [f"s{i}" for i in range(settings)] if settings > 1 else [""]
    lines = []
    for v, label in enumerate(labels):
        for s, setting in enumerate(names):
            for seed in range(seeds):
                line = simulated.result(label, labels[label], seed)
                score = float(scores[v, s, seed])
                lines.append(line | {"score": score, "setting": setting, "curve": []})
    body = simulated.study(labels, "v0", list(range(seeds)))
    body |= {"settings": names if settings > 1 else []}
    return simulated.write(workdir, body, lines)


def verdicts(workdir):
    """Returns the verdicts of results.csv, without the baseline's."""
    write_csv(summarize(files.read(workdir)), workdir / "results.csv")
    lines = csv.DictReader((workdir / "results.csv").open(encoding="utf-8"))
    return [line["verdict"] for line in lines][1:]


@pytest.mark.parametrize(
    ("variants", "settings", "seeds", "setting_effects"),
    [(4, 1, 3, 0), (19, 1, 3, 0), (6, 60, 3, 2), (6, 20, 3, 0.5)],
)
def test_null_studies_raise_few_alarms(tmp_path, variants, settings, seeds, setting_effects):
    """The last two have the shape of the synthetic study: no variant differs on average, but
    settings do."""
    rng = np.random.default_rng(0)
    studies = 20
    alarms = 0
    for number in range(studies):
        scores = 2 + rng.normal(0, 0.015, (variants, settings, seeds))
        scores += 0.015 * setting_effects * rng.normal(size=(variants, settings, 1))
        alarms += set(verdicts(study_of(tmp_path / str(number), scores))) != {"no difference shown"}
    assert alarms <= studies * 0.05 + 3 * math.sqrt(studies * 0.05 * 0.95)


def test_effects_of_four_standard_errors_are_found(tmp_path):
    rng = np.random.default_rng(1)
    words = []
    for number in range(20):
        scores = 2 + rng.normal(0, 0.01, (4, 1, 12))
        scores[1:] += 4 * 0.01 * math.sqrt(2 / 12)
        words += verdicts(study_of(tmp_path / str(number), scores))
    assert words.count("worse") >= 0.9 * len(words)


def test_a_ceiling_is_named(tmp_path):
    """Of 60 pairs 48 are exactly equal, as in a task that all variants solve."""
    rng = np.random.default_rng(2)
    scores = np.zeros((2, 20, 3))
    scores[:, :4] = rng.uniform(0.1, 0.2, (2, 4, 3))
    workdir = study_of(tmp_path, scores)
    write_report(workdir)
    (line,) = list(csv.DictReader((workdir / "results.csv").open(encoding="utf-8")))[1:]
    assert line["ceiling"] == "True" and line["ties"] == "48"
    text = (workdir / "report.md").read_text(encoding="utf-8")
    assert "The task has a ceiling." in text and "48 of 60" in text
