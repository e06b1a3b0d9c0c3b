"""The last section of the report: what was run, how to repeat it, and what the words mean."""

from __future__ import annotations

import json

from qkvjax.analysis.document import Code, Fold, Heading, Pairs, Paragraph, Terms, words
from qkvjax.analysis.summary import Summary
from qkvjax.analysis.texts import texts
from qkvjax.config import flatten


def what_was_run(summary: Summary) -> list:
    """Environment, data, configuration, failed runs, command, definitions."""
    study = summary.study
    parts = [Heading("What was run")]
    if study.get("command"):
        parts += [Paragraph("To repeat it:"), Code(str(study["command"]))]
    environment = study.get("environment") or {}
    if environment:
        rows = [(str(name), text(value)) for name, value in environment.items()]
        parts += [Heading("Environment", 3), Pairs(rows)]
    parts += _data(summary)
    points = [[row.label, _settings(row.settings)] for row in summary.rows]
    table = words(["Variant", "differs from the base configuration in"], points)
    parts += [Heading("The variants", 3), table]
    parts += _failures(summary)
    config = flatten(study.get("config") or {})
    if config:
        rows = [(name, text(value)) for name, value in sorted(config.items())]
        parts.append(Fold(f"The base configuration ({len(rows)} fields)", [Pairs(rows)]))
    metric = summary.metric
    first = [(metric.name, metric.definition)]
    if metric.relative:
        first.append(("percent", f"of the baseline’s mean {metric.name}."))
    first += texts("definitions.toml").items()
    return [*parts, Heading("What the words mean", 3), Terms(first)]


def text(value) -> str:
    """A JSON value for people: words as they are, the rest as JSON."""
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _settings(settings: dict) -> str:
    return ", ".join(f"{name} = {text(value)}" for name, value in settings.items()) or "nothing"


def _data(summary: Summary) -> list:
    data = summary.study.get("data") or {}
    rows = []
    for name, value in data.items():
        counted = name.startswith("num_") and isinstance(value, (int, float))
        rows.append((name.replace("_", " "), f"{value:,}" if counted else text(value)))
    one = next(iter(summary.results), {})
    for name in ("tokenizer", "num_labels", "num_bytes", "pad_fraction"):
        if one.get(name) is not None:
            value = one[name]
            counted = name.startswith("num_")
            title = f"{'scored ' if counted else ''}{name.removeprefix('num_')}".replace("_", " ")
            rows.append((title, f"{value:,}" if counted else text(value)))
    ends = [
        f"{row.label} {sum(values) / len(values):,.2f}"
        for row in summary.rows
        if (values := [r["perplexity"] for r in row.results.values() if r.get("perplexity")])
    ]
    if ends:
        rows.append(("perplexity a token, mean over seeds", ", ".join(ends)))
    return [Heading("Data", 3), Pairs(rows)] if rows else []


def _failures(summary: Summary) -> list:
    rows = [
        [row.label, str(seed), error]
        for row in summary.rows
        for seed, error in sorted(row.failed.items())
    ]
    if not rows:
        return []
    number = "1 run" if len(rows) == 1 else f"{len(rows)} runs"
    table = words(["Variant", "Seed", "Error"], rows, f"{number} ended without a score.")
    return [Heading("Failed runs", 3), table]
