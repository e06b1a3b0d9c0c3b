"""The report of a study: what a researcher would show a colleague.

`write_report` turns the files of a study's workdir into results.csv, report.md, report.html and
plots/. It trains nothing and does not import jax, so a report can be written on any machine. Two
templates render the same sentences, tables and plots.
"""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

from qkvjax import formats
from qkvjax.report import drawing, facts, literature, plots, tables
from qkvjax.report import files as study_files
from qkvjax.report.answer import answer, measured_difference
from qkvjax.report.by_setting import by_setting
from qkvjax.report.csv_file import write_csv
from qkvjax.report.decisions import decisions
from qkvjax.report.rendering import TEMPLATES, render
from qkvjax.report.summary import Summary, summarize


def write_report(workdir: Path) -> Path:
    """Writes results.csv, report.md, report.html and plots/*.svg from a study's files.

    Returns:
      The path of report.html.

    Raises:
      UserError: the workdir has no readable study.json.
    """
    workdir = Path(workdir)
    summary = summarize(study_files.read(workdir))
    figures = plots.draw(summary)
    values = context(summary, figures)
    write_csv(summary, workdir / "results.csv")
    drawing.write(figures, workdir / "plots")
    (workdir / "report.md").write_text(render("report.md.j2", values), encoding="utf-8")
    page = workdir / "report.html"
    page.write_text(render("report.html.j2", values), encoding="utf-8")
    return page


def closing_lines(workdir: Path) -> list[str]:
    """Returns a small table for the terminal: a line for each variant, and how it compares."""
    summary = summarize(study_files.read(Path(workdir)))
    metric = summary.metric
    rows = []
    for label, row in summary.variants.iterrows():
        difference = ""
        verdict = "no finished run"
        if label == summary.baseline:
            verdict = "baseline"
        elif not math.isnan(row["difference"]):
            difference = measured_difference(summary, row)
            verdict = "no interval" if math.isnan(row["low"]) else row["verdict"]
        rows.append([label, difference, metric.text(row["score"]), verdict])
    header = [("", "variant"), ("difference", metric.of), ("", metric.name), ("", "verdict")]
    return formats.table(header, rows)


def context(summary: Summary, figures: dict[str, str]) -> dict:
    """Returns what the templates show, in the order in which they show it.

    Args:
      figures: name -> SVG of the plots.
    """
    study = summary.study
    cost_tables = [
        tables.quality(summary),
        tables.equal_cache(summary),
        None if summary.settings else tables.costs(summary),
        tables.items(summary),
        tables.paper(summary),
        tables.tuned(summary),
    ]
    return {
        "title": str(study.get("title") or "A study"),
        "subtitle": facts.subtitle(summary),
        "padding": facts.padding(summary),
        "notes": [*summary.files.notes, *facts.incomparable_runs(summary)],
        "answer": answer(summary),
        "tables": [table for table in cost_tables if table is not None],
        "settings": by_setting(summary),
        "figures": _figures(summary, figures),
        "inside": tables.inside(summary),
        "decisions": decisions(summary),
        "samples": facts.samples(summary),
        "command": study.get("command"),
        "environment": facts.pairs(study.get("environment") or {}),
        "data": facts.data(summary),
        "variants": facts.variants(summary),
        "failures": facts.failures(summary),
        "config": facts.configuration(summary),
        "definitions": _definitions(summary),
    }


def _figures(summary: Summary, figures: dict[str, str]) -> list[dict]:
    """Returns the plots with their captions."""
    captions = _read_texts("captions.toml")
    paper = captions.pop("paper")
    if not (literature.pure(summary, "q-k=v") and summary.metric.relative):
        paper = ""
    if summary.settings:
        over = "settings and seeds"
        setting = f" of {summary.settings[0]}"
    else:
        over = "seeds; the bands reach from the best to the worst seed"
        setting = ""
    values = {"base": summary.baseline, "over": over, "paper": paper, "first": setting}
    return [
        {"name": name, "svg": svg, "caption": captions[name].format(**values)}
        for name, svg in figures.items()
    ]


def _definitions(summary: Summary) -> list[tuple[str, str]]:
    """Returns what the words of a report mean."""
    metric = summary.metric
    rows = [(metric.name, metric.definition)]
    if metric.relative:
        rows.append(("percent", f"of the baseline’s mean {metric.name}."))
    return [*rows, *_read_texts("definitions.toml").items()]


def _read_texts(name: str) -> dict[str, str]:
    return tomllib.loads((TEMPLATES / name).read_text(encoding="utf-8"))
