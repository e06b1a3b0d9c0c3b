"""The report of a study: what a researcher would show a colleague.

`write_report` turns the files of a study's workdir into results.csv, report.md, report.html and
plots/. It trains nothing and imports no jax, so that a report can be written anywhere. One context
of sentences, tables and plots is rendered by two templates.
"""

from __future__ import annotations

import html
import json
import math
import re
import tomllib
from pathlib import Path

from qkvjax import formats
from qkvjax.config import flatten
from qkvjax.report import drawing, literature, plots, tables
from qkvjax.report import files as study_files
from qkvjax.report.answer import answer, measured_difference
from qkvjax.report.by_setting import by_setting
from qkvjax.report.decisions import decisions
from qkvjax.report.summary import Summary, summarize, write_csv

TEMPLATES = Path(__file__).with_name("templates")


def write_report(workdir: Path) -> Path:
    """Writes results.csv, report.md, report.html and plots/*.svg from a study's files.

    Returns:
      The path of report.html.

    Raises:
      UserError: the workdir holds no readable study.json.
    """
    workdir = Path(workdir)
    summary = summarize(study_files.read(workdir))
    figures = plots.draw(summary)
    words = context(summary, figures)
    write_csv(summary, workdir / "results.csv")
    drawing.write(figures, workdir / "plots")
    (workdir / "report.md").write_text(render("report.md.j2", words), encoding="utf-8")
    page = workdir / "report.html"
    page.write_text(render("report.html.j2", words), encoding="utf-8")
    return page


def closing_lines(workdir: Path) -> list[str]:
    """Returns a small table for the terminal: a line a variant, and how it compares."""
    summary = summarize(study_files.read(Path(workdir)))
    rows = []
    for label, row in summary.variants.iterrows():
        difference, word = "", "no finished run"
        if label == summary.baseline:
            word = "baseline"
        elif not math.isnan(row["difference"]):
            difference = measured_difference(summary, row)
            word = "no interval" if math.isnan(row["low"]) else row["verdict"]
        rows.append([label, difference, summary.metric.text(row["score"]), word])
    metric = summary.metric
    header = [("", "variant"), ("difference", metric.of), ("", metric.name), ("", "verdict")]
    return formats.table(header, rows)


def render(template: str, words: dict) -> str:
    """Returns a template of this folder filled in; HTML is escaped, Markdown by its filter `md`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["md"] = markdown
    environment.filters["inline_svg"] = inline_svg
    environment.filters["fence"] = fence
    environment.globals["style"] = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(words)


def context(summary: Summary, figures: dict[str, str]) -> dict:
    """Returns what the templates show, in the order in which they show it."""
    study = summary.study
    return {
        "title": str(study.get("title") or "A study"),
        "subtitle": _subtitle(summary),
        "padding": _padding(summary),
        "notes": [*summary.files.notes, *_mixtures(summary)],
        "answer": answer(summary),
        "tables": [
            one
            for one in (
                tables.quality(summary),
                tables.equal_cache(summary),
                None if summary.settings else tables.costs(summary),
                tables.items(summary),
                tables.paper(summary),
                tables.tuned(summary),
            )
            if one is not None
        ],
        "settings": by_setting(summary),
        "figures": _figures(summary, figures),
        "inside": tables.inside(summary),
        "decisions": decisions(summary),
        "samples": _samples(summary),
        "command": study.get("command"),
        "environment": _pairs(study.get("environment") or {}),
        "data": _data(summary),
        "variants": _variants(summary),
        "failures": _failures(summary),
        "config": _pairs(dict(sorted(flatten(study.get("config") or {}).items()))),
        "definitions": _definitions(summary),
    }


def markdown(text: str) -> str:
    """Returns text that Markdown and the HTML inside it leave alone, on one line."""
    text = re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", str(text))
    return re.sub(r"\s*[\r\n]+\s*", " ", text)


def fence(text: str) -> str:
    """Returns the row of backquotes that can stand around a text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)


def inline_svg(svg: str, name: str, caption: str) -> str:
    """Returns the SVG without its XML head, its ids made unique, its neutral colours the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, role in ((drawing.INK, "ink"), (drawing.PAPER, "paper"), (drawing.FAINT, "faint")):
        svg = svg.replace(colour, f"var(--{role})")
    label = html.escape(caption, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _subtitle(summary: Summary) -> str:
    environment = summary.study.get("environment") or {}
    ended = int(summary.variants["num_runs"].sum())
    planned = len(summary.variants) * summary.planned
    parts = []
    if summary.base["num_params"] > 0 and not summary.settings:
        parts.append(f"{formats.count(summary.base['num_params'])} parameters")
    parts += _range(summary, "tokens", "training tokens a run")
    parts += _range(summary, "num_labels", "labels scored")
    count = len(summary.variants)
    variants = f"{count} variants" if count > 1 else "1 variant"
    times = f" × {len(summary.settings)} settings" if summary.settings else ""
    parts.append(f"{variants}{times} × {formats.seeds(len(summary.study['seeds']))}")
    if ended != planned:
        parts.append(f"{ended} of {planned} runs finished")
    if environment.get("device"):
        number = environment.get("num_devices") or 1
        parts.append(f"{number} × {environment['device']}" if number > 1 else environment["device"])
    if environment.get("date"):
        parts.append(str(environment["date"])[:10])
    return " · ".join(parts)


def _range(summary: Summary, column: str, what: str) -> list[str]:
    """Returns ["369k training tokens a run"], or from the least to the most; [] when unknown."""
    if column not in summary.done or not summary.done[column].notna().any():
        return []
    values = summary.done[column].dropna().astype(float)
    ends = dict.fromkeys((formats.count(values.min()), formats.count(values.max())))
    return [f"{' to '.join(ends)} {what}"]


def _padding(summary: Summary) -> str:
    """Returns the part of the scored labels that is padding, as text; "" where none is."""
    done = summary.done
    fraction = done["pad_fraction"].max() if "pad_fraction" in done else 0
    scored = "score_pads" in done and done["score_pads"].fillna(False).astype(bool).any()
    if not scored and not fraction > 0:
        return ""
    return formats.percent(0 if math.isnan(fraction) else fraction, sign=False)


def _mixtures(summary: Summary) -> list[str]:
    """Returns sentences about runs that are not comparable with each other."""
    notes = []
    done = summary.done
    if len(done) and "data_digest" in done:
        digests = done.groupby("setting")["data_digest"].agg(lambda found: set(found.dropna()))
        if "" in digests.index:
            digests[""] |= {(summary.study.get("data") or {}).get("digest")} - {None}
        if any(len(found) > 1 for found in digests):
            notes.append(
                "The runs did not all read the same data (their data digests differ): the scores"
                " are not comparable. Run the study again in a fresh workdir."
            )
    for label, steps in done.groupby("label")["steps"]:
        if steps.groupby(done["setting"]).nunique().max() > 1:
            listed = ", ".join(f"{value:.0f}" for value in sorted(steps.dropna().unique()))
            notes.append(f"The runs of {label} have different lengths ({listed} steps).")
    return notes


def _figures(summary: Summary, figures: dict[str, str]) -> list[dict]:
    """Returns the plots with their captions."""
    captions = _texts("captions.toml")
    paper = captions.pop("paper")
    paper = paper if literature.pure(summary, "q-k=v") and summary.metric.relative else ""
    over = "settings and seeds" if summary.settings else "seeds"
    bands = "" if summary.settings else "; the bands reach from the best to the worst seed"
    first = f" of {summary.settings[0]}" if summary.settings else ""
    words = {"base": summary.baseline, "over": over + bands, "paper": paper, "first": first}
    return [
        {"name": name, "svg": svg, "caption": captions[name].format(**words)}
        for name, svg in figures.items()
    ]


def _samples(summary: Summary) -> list[dict]:
    """Returns a sample of each model: title, prompt, and what it made of it."""
    samples: dict[str, dict] = {}
    for line in sorted(summary.files.lines, key=lambda line: line["seed"]):
        sample = line.get("sample")
        if sample and line["phase"] == "compare":
            prompt, text = str(sample.get("prompt") or ""), str(sample.get("text") or "")
            title = f"{line['label']}, seed {line['seed']}"
            text = text.removeprefix(prompt) if prompt else text
            samples.setdefault(line["label"], {"title": title, "prompt": prompt, "text": text})
    return [samples[label] for label in summary.variants.index if label in samples]


def _text(value) -> str:
    """Returns a JSON value for people: words as they are, the rest as JSON."""
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _pairs(values: dict) -> list[tuple[str, str]]:
    return [(str(name), _text(value)) for name, value in values.items()]


def _data(summary: Summary) -> list[tuple[str, str]]:
    rows = []
    for name, value in (summary.study.get("data") or {}).items():
        counted = name.startswith("num_") and isinstance(value, (int, float))
        rows.append((name.replace("_", " "), f"{value:,}" if counted else _text(value)))
    one = summary.done.iloc[0] if len(summary.done) else {}
    for name in ("tokenizer", "num_labels", "num_bytes", "pad_fraction"):
        value = one.get(name)
        if isinstance(value, str):
            rows.append((name, value))
        elif value is not None and not math.isnan(value):
            counted = name.startswith("num_")
            title = f"{'scored ' if counted else ''}{name.removeprefix('num_')}".replace("_", " ")
            rows.append((title, f"{value:,.0f}" if counted else f"{value:g}"))
    if "perplexity" in summary.done:
        means = summary.done.groupby("label")["perplexity"].mean().dropna()
        labels = [label for label in summary.variants.index if label in means]
        ends = [f"{label} {means[label]:,.2f}" for label in labels]
        if ends:
            rows.append(("perplexity a token, mean over seeds", ", ".join(ends)))
    return rows


def _variants(summary: Summary) -> tables.Table:
    """The fields of each point, as the study gives them."""
    rows = []
    for point in summary.study["points"]:
        given = ", ".join(f"{n} = {_text(v)}" for n, v in (point.get("overrides") or {}).items())
        rows.append([point["label"], given or "nothing"])
    heads = ["Variant", "differs from the base configuration in"]
    return tables.table(heads, rows, tuple(heads))


def _failures(summary: Summary) -> tables.Table | None:
    failed = summary.runs[summary.runs["status"] == "failed"]
    if not len(failed):
        return None
    rows = [
        [
            row["label"],
            f"{row['setting']}, seed {row['seed']}" if row["setting"] else str(row["seed"]),
            str(row["error"] or "no error was recorded"),
        ]
        for _, row in failed.iterrows()
    ]
    number = "1 run" if len(rows) == 1 else f"{len(rows)} runs"
    heads = ["Variant", "Seed", "Error"]
    return tables.table(heads, rows, tuple(heads), f"{number} ended without a score.")


def _definitions(summary: Summary) -> list[tuple[str, str]]:
    metric = summary.metric
    rows = [(metric.name, metric.definition)]
    if metric.relative:
        rows.append(("percent", f"of the baseline’s mean {metric.name}."))
    return rows + list(_texts("definitions.toml").items())


def _texts(name: str) -> dict[str, str]:
    return tomllib.loads((TEMPLATES / name).read_text(encoding="utf-8"))
