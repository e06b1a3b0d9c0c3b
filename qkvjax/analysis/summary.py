"""From the files of a study to a table: a row a variant."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qkvjax.analysis import curves, formats
from qkvjax.analysis.metric import METRICS, Metric
from qkvjax.analysis.records import Records
from qkvjax.analysis.statistics import Interval, Paired, mean_interval, paired
from qkvjax.config import flatten
from qkvjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
      label: as study.json names it.
      settings: field -> value of this point, for every field that some point overrides.
      changed: the settings that differ from the baseline's.
      results: seed -> result line of the finished runs.
      failed: seed -> error of the failed ones.
      score: over seeds; None without a finished run.
      paired: against the baseline; None for the baseline and without a common seed.
      train_validation_gap: mean score on validation text minus that on training text.
      num_params: learned numbers.
      flops_per_token: forward and backward, of training: 6 times the forward multiply-adds
        of a sequence over its length (2 FLOPs each; the backward pass costs twice the forward).
      cache_bytes_per_token: of the decode cache, all layers.
      measured: its row of measurements.json, or {}.
      curve: the validation curve.
      steps_to, seconds_to: for each of the summary's common losses; None where not reached.
    """

    label: str
    settings: dict
    changed: dict
    results: dict[int, dict]
    failed: dict[int, str]
    score: Interval | None
    paired: Paired | None
    train_validation_gap: float | None
    num_params: int | None
    flops_per_token: float | None
    cache_bytes_per_token: float | None
    measured: dict
    curve: curves.Curve | None
    steps_to: tuple[float | None, ...]
    seconds_to: tuple[float | None, ...]

    @property
    def scores(self) -> dict[int, float]:
        """seed -> score."""
        return {seed: result["score"] for seed, result in self.results.items()}


@dataclasses.dataclass(frozen=True)
class Summary:
    """The study as a table. `marks` are the common losses of `Row.steps_to`."""

    records: Records
    rows: tuple[Row, ...]
    marks: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def study(self) -> dict:
        """study.json."""
        return self.records.study

    @property
    def metric(self) -> Metric:
        """What the variants are compared by."""
        return METRICS[_metric_key(self.study, self.records.results)]

    @property
    def settings(self) -> list[str]:
        """Names of the settings that every variant is trained in; empty where there is one."""
        return self.study.get("settings") or []

    @property
    def planned(self) -> int:
        """Runs of each variant."""
        return len(self.study["seeds"]) * max(1, len(self.settings))

    def runs(self, n: int) -> str:
        """How many runs a figure stands on: "3 seeds", or "36 runs"."""
        return f"{n:,} runs" if self.settings else formats.seeds(n)

    @property
    def baseline(self) -> Row:
        """The row that the others are compared with."""
        return next(row for row in self.rows if row.label == self.study["baseline"])

    @property
    def others(self) -> list[Row]:
        """The rows beside the baseline."""
        return [row for row in self.rows if row.label != self.study["baseline"]]

    @property
    def compared(self) -> list[Row]:
        """The rows with a paired difference."""
        return [row for row in self.others if row.paired]

    @property
    def results(self) -> list[dict]:
        """The lines of all finished runs."""
        return [result for row in self.rows for result in row.results.values()]

    @property
    def score_pads(self) -> bool:
        """Whether any run scored padding."""
        return any(r.get("score_pads") or (r.get("pad_fraction") or 0) > 0 for r in self.results)

    def relative(self, value: float | None) -> float | None:
        """A difference as a part of the baseline's mean score, or as it is where the metric says
        so."""
        base = self.baseline.score
        if not self.metric.relative:
            return value
        return None if value is None or not base or not base.mean else value / base.mean

    def cache_saved(self, row: Row) -> float | None:
        """The part of the baseline's cache that a variant saves."""
        base, own = self.baseline.cache_bytes_per_token, row.cache_bytes_per_token
        return 1 - own / base if base and own is not None else None


def summarize(records: Records) -> Summary:
    """Builds the table from the files of a study."""
    study = records.study
    config = flatten(study.get("config") or {})
    points = {point["label"]: dict(point.get("overrides") or {}) for point in study["points"]}
    fields = sorted({field for overrides in points.values() for field in overrides})
    settings = {
        label: {field: overrides.get(field, config.get(field)) for field in fields}
        for label, overrides in points.items()
    }
    base = settings[study["baseline"]]
    done = {label: {} for label in points}
    failed = {label: {} for label in points}
    for (label, seed), line in sorted(records.results.items(), key=lambda item: str(item[0])):
        if line.get("status") == "done":
            done[label][seed] = line
        else:
            failed[label][seed] = str(line.get("error") or "no error was recorded")
    key = _metric_key(study, records.results)
    lines = {label: curves.curve(results, key) for label, results in done.items()}
    marks = curves.common_losses([c for c in lines.values() if c is not None])
    baseline_scores = {seed: line["score"] for seed, line in done[study["baseline"]].items()}
    rows = []
    for label, results in done.items():
        scores = {seed: line["score"] for seed, line in results.items()}
        costs = _common([line.get("costs") or {} for line in results.values()])
        macs, length = costs.get("forward_macs"), costs.get("seq_len")
        line = lines[label]
        rows.append(
            Row(
                label=label, settings=settings[label],
                changed={f: v for f, v in settings[label].items() if v != base[f]}, results=results,
                failed=failed[label],
                score=mean_interval(list(scores.values())) if scores else None,
                paired=None if label == study["baseline"] else paired(baseline_scores, scores),
                train_validation_gap=_gap(results), num_params=costs.get("num_params"),
                flops_per_token=6 * macs / length if macs and length else None,
                cache_bytes_per_token=costs.get("cache_bytes_per_token"),
                measured=records.measurements.get(label, {}), curve=line,
                steps_to=tuple(line and curves.reach(line.steps, line.mean, m) for m in marks),
                seconds_to=tuple(line and curves.reach(line.seconds, line.mean, m) for m in marks),
            )
        )  # fmt: skip
    return Summary(records, tuple(rows), marks, tuple(records.notes + _mixtures(records, rows)))


def _metric_key(study: Mapping, results: Mapping) -> str:
    """The metric of the results; without one, of the study's evaluator."""
    found = {line["metric"] for line in results.values() if line.get("metric") in METRICS}
    if len(found) > 1:
        raise UserError(f"results.jsonl mixes the scores {', '.join(sorted(found))}: start anew")
    kind = flatten(study.get("config") or {}).get("evals.eval.kind")
    return next(iter(found), "error" if kind == "accuracy" else "bits_per_byte")


def write_csv(summary: Summary, path: Path) -> None:
    """Writes results.csv, a line a variant; unknown values are empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        lines = [_csv_line(summary, row) for row in summary.rows]
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _csv_line(summary: Summary, row: Row) -> dict:
    score, pair, measured = row.score, row.paired, row.measured
    line = {"label": row.label} | row.settings
    line |= {
        "metric": summary.metric.key, "num_seeds": len(row.results), "score": score and score.mean,
        "ci_low": score and score.low, "ci_high": score and score.high,
        "difference": pair and pair.mean, "difference_low": pair and pair.low,
        "difference_high": pair and pair.high,
        "verdict": pair.verdict if pair else "baseline" if row is summary.baseline else "not run",
        "smallest_detectable_effect": pair and pair.smallest_detectable_effect,
        **{name: _mean(row, name) for name in ("accuracy", "class_accuracy", "solved")},
        "train_validation_gap": row.train_validation_gap, "num_params": row.num_params,
        "flops_per_token": row.flops_per_token, "cache_bytes_per_token": row.cache_bytes_per_token,
        "step_ratio": first(measured.get("step_ratio")), "peak_bytes": measured.get("peak_bytes"),
        "decode_ratio": first(measured.get("decode_ratio")),
    }  # fmt: skip
    for mark, steps, seconds in zip(summary.marks, row.steps_to, row.seconds_to, strict=True):
        line |= {f"steps_to_{mark:.3f}": steps, f"seconds_to_{mark:.3f}": seconds}
    return {name: "" if value is None else value for name, value in line.items()}


def _mean(row: Row, name: str) -> float | None:
    values = [line[name] for line in row.results.values() if line.get(name) is not None]
    return float(np.mean(values)) if values else None


def _common(costs: list[dict]) -> dict:
    """What all runs of a variant have in common; settings of several sizes have none."""
    one = costs[0] if costs else {}
    return {name: v for name, v in one.items() if all(c.get(name) == v for c in costs)}


def first(ratio):
    """The middle of [ratio, low, high], or None."""
    return ratio[0] if ratio else None


def _gap(results: Mapping[int, Mapping]) -> float | None:
    gaps = [r["score"] - r["train_score"] for r in results.values() if r.get("train_score")]
    return float(np.mean(gaps)) if gaps else None


def _mixtures(records: Records, rows: list[Row]) -> list[str]:
    """Sentences about runs that are not comparable with each other."""
    notes = []
    digests: dict[str, set] = {}  # by setting: others may have other data
    for row in rows:
        for line in row.results.values():
            digests.setdefault(line.get("setting") or "", set()).add(line.get("data_digest"))
    digests.get("", set()).add((records.study.get("data") or {}).get("digest"))
    if any(len(found - {None}) > 1 for found in digests.values()):
        notes.append(
            "The runs did not all read the same data (their data digests differ): the scores are"
            " not comparable. Run the study again in a fresh workdir."
        )
    for row in rows:
        lengths = {line.get("steps") for line in row.results.values()}
        if len(lengths) > 1:
            listed = ", ".join(map(str, sorted(lengths, key=str)))
            notes.append(f"The runs of {row.label} have different lengths ({listed} steps).")
    return notes
