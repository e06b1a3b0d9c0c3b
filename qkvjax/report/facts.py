"""What was run, as a report shows it: title line, warnings, samples, data, variants, failures."""

from __future__ import annotations

import json
import math

from qkvjax import formats
from qkvjax.config import flatten
from qkvjax.report import tables
from qkvjax.report.summary import Summary


def subtitle(summary: Summary) -> str:
    """Returns the line below the title: sizes, numbers of variants and seeds, device, date."""
    parts = []
    if summary.base["num_params"] > 0 and not summary.settings:
        parts.append(f"{formats.count(summary.base['num_params'])} parameters")
    parts += _range(summary, "tokens", "training tokens per run")
    parts += _range(summary, "num_labels", "labels scored")
    parts.append(_design(summary))
    finished = int(summary.variants["num_runs"].sum())
    planned = len(summary.variants) * summary.planned
    if finished != planned:
        parts.append(f"{finished} of {planned} runs finished")
    environment = summary.study.get("environment") or {}
    if environment.get("device"):
        count = environment.get("num_devices") or 1
        times = f"{count} × " if count > 1 else ""
        parts.append(f"{times}{environment['device']}")
    if environment.get("date"):
        parts.append(str(environment["date"])[:10])
    return " · ".join(parts)


def _design(summary: Summary) -> str:
    """Returns "5 variants × 12 settings × 3 seeds"."""
    count = len(summary.variants)
    parts = [f"{count} variants" if count > 1 else "1 variant"]
    if summary.settings:
        parts.append(f"{len(summary.settings)} settings")
    parts.append(formats.seeds(len(summary.study["seeds"])))
    return " × ".join(parts)


def _range(summary: Summary, column: str, what: str) -> list[str]:
    """Returns ["369k training tokens per run"], or from the least to the most; [] if unknown."""
    if column not in summary.done or not summary.done[column].notna().any():
        return []
    values = summary.done[column].dropna().astype(float)
    ends = dict.fromkeys((formats.count(values.min()), formats.count(values.max())))
    return [f"{' to '.join(ends)} {what}"]


def padding(summary: Summary) -> str:
    """Returns the part of the scored labels that is padding, as text; "" where none is."""
    done = summary.done
    fraction = done["pad_fraction"].max() if "pad_fraction" in done else 0
    scored = "score_pads" in done and done["score_pads"].fillna(False).astype(bool).any()
    if not scored and not fraction > 0:
        return ""
    return formats.percent(0 if math.isnan(fraction) else fraction, sign=False)


def incomparable_runs(summary: Summary) -> list[str]:
    """Returns warnings about runs that read different data or have different lengths."""
    notes = []
    done = summary.done
    if len(done) and "data_digest" in done:
        digests = done.groupby("setting")["data_digest"].agg(lambda values: set(values.dropna()))
        if "" in digests.index:
            digests[""] |= {(summary.study.get("data") or {}).get("digest")} - {None}
        if any(len(values) > 1 for values in digests):
            notes.append(
                "The runs did not all read the same data (their data digests differ), so the scores"
                " are not comparable. Run the study again in a fresh workdir."
            )
    for label, steps in done.groupby("label")["steps"]:
        if steps.groupby(done["setting"]).nunique().max() > 1:
            lengths = ", ".join(f"{value:.0f}" for value in sorted(steps.dropna().unique()))
            notes.append(f"The runs of {label} have different lengths ({lengths} steps).")
    return notes


def samples(summary: Summary) -> list[dict]:
    """Returns a sample of each model: title, prompt, and the text with which it continues."""
    by_label: dict[str, dict] = {}
    for line in sorted(summary.files.lines, key=lambda line: line["seed"]):
        sample = line.get("sample")
        if not sample or line["phase"] != "compare" or line["label"] in by_label:
            continue
        prompt = str(sample.get("prompt") or "")
        text = str(sample.get("text") or "")
        by_label[line["label"]] = {
            "title": f"{line['label']}, seed {line['seed']}",
            "prompt": prompt,
            "text": text.removeprefix(prompt),
        }
    return [by_label[label] for label in summary.variants.index if label in by_label]


def pairs(values: dict) -> list[tuple[str, str]]:
    """Returns names and values as texts."""
    return [(str(name), _text(value)) for name, value in values.items()]


def _text(value) -> str:
    """Returns a JSON value for people: words as they are, the rest as JSON."""
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def data(summary: Summary) -> list[tuple[str, str]]:
    """Returns names and values of what the runs read and what was scored."""
    rows = []
    for name, value in (summary.study.get("data") or {}).items():
        is_count = name.startswith("num_") and isinstance(value, (int, float))
        rows.append((name.replace("_", " "), f"{value:,}" if is_count else _text(value)))
    first_run = summary.done.iloc[0] if len(summary.done) else {}
    for name in ("tokenizer", "num_labels", "num_bytes", "pad_fraction"):
        value = first_run.get(name)
        if isinstance(value, str):
            rows.append((name, value))
        elif value is None or math.isnan(value):
            continue
        elif name.startswith("num_"):
            rows.append((f"scored {name.removeprefix('num_')}", f"{value:,.0f}"))
        else:
            rows.append((name.replace("_", " "), f"{value:g}"))
    return rows + _perplexities(summary)


def _perplexities(summary: Summary) -> list[tuple[str, str]]:
    if "perplexity" not in summary.done:
        return []
    means = summary.done.groupby("label")["perplexity"].mean().dropna()
    values = [f"{label} {means[label]:,.2f}" for label in summary.variants.index if label in means]
    return [("perplexity per token, mean over seeds", ", ".join(values))] if values else []


def variants(summary: Summary) -> tables.Table:
    """Returns the fields that each variant changes, as the study gives them."""
    rows = []
    for point in summary.study["points"]:
        overrides = point.get("overrides") or {}
        changes = ", ".join(f"{name} = {_text(value)}" for name, value in overrides.items())
        rows.append([point["label"], changes or "nothing"])
    columns = ["Variant", "differs from the base configuration in"]
    return tables.table(columns, rows, tuple(columns))


def failures(summary: Summary) -> tables.Table | None:
    """Returns the runs that failed and their errors; None if none did."""
    failed = summary.runs[summary.runs["status"] == "failed"]
    if not len(failed):
        return None
    rows = []
    for _, run in failed.iterrows():
        setting = f"{run['setting']}, seed {run['seed']}" if run["setting"] else str(run["seed"])
        rows.append([run["label"], setting, str(run["error"] or "no error was recorded")])
    number = "1 run" if len(rows) == 1 else f"{len(rows)} runs"
    columns = ["Variant", "Seed", "Error"]
    return tables.table(columns, rows, tuple(columns), f"{number} ended without a score.")


def configuration(summary: Summary) -> list[tuple[str, str]]:
    """Returns the fields of the base configuration, by name."""
    return pairs(dict(sorted(flatten(summary.study.get("config") or {}).items())))
