"""A study as one table, a row a variant: scores, differences, verdicts, costs."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pandas as pd

from qkvjax.config import flatten
from qkvjax.errors import UserError
from qkvjax.report import results, statistics
from qkvjax.report.files import StudyFiles
from qkvjax.report.metric import METRICS, Metric

MARGIN = 0.01  # of the baseline's score (or of the labels): differences within it are equivalent
COSTS = ("num_params", "train_flops_per_token", "cache_bytes_per_token")
MEASURED = ("step_ratio", "step_seconds", "peak_bytes", "decode_ratio", "decode_seconds")


@dataclasses.dataclass(frozen=True)
class Summary:
    """The tables that a report is made of.

    Attributes:
      files: of the study.
      runs: `results.frame`: all runs.
      curves: `results.curves_frame`, of the compared runs.
      variants: a row a variant, the baseline first, indexed by label: score, score_low, score_high,
        num_runs, num_failed, gap (held-out score minus training score), COSTS where all runs agree,
        MEASURED where they were, and the columns of `statistics.compare`, missing where a variant
        is not compared.
    """

    files: StudyFiles
    runs: pd.DataFrame
    curves: pd.DataFrame
    variants: pd.DataFrame

    @property
    def study(self) -> dict:
        """study.json."""
        return self.files.study

    @property
    def baseline(self) -> str:
        """The label that the others are compared with."""
        return self.study["baseline"]

    @property
    def base(self) -> pd.Series:
        """The baseline's row."""
        return self.variants.loc[self.baseline]

    @functools.cached_property
    def metric(self) -> Metric:
        """What the variants are compared by."""
        return METRICS[_metric_key(self.study, self.runs)]

    @functools.cached_property
    def done(self) -> pd.DataFrame:
        """The finished runs that are compared."""
        return finished(self.runs)

    @property
    def compared(self) -> pd.DataFrame:
        """The rows of `variants` with a paired difference."""
        return self.variants[self.variants["difference"].notna()]

    @property
    def settings(self) -> list[str]:
        """Names of the settings that every variant is trained in; empty where there is one."""
        return self.study.get("settings") or []

    @property
    def planned(self) -> int:
        """Compared runs of each variant."""
        return len(self.study["seeds"]) * max(1, len(self.settings))

    @functools.cached_property
    def changes(self) -> dict[str, dict]:
        """Label -> the fields in which a variant differs from the baseline, with their values."""
        base = flatten(self.study.get("config") or {})
        points = {p["label"]: dict(p.get("overrides") or {}) for p in self.study["points"]}
        whole = {label: base | overrides for label, overrides in points.items()}
        ours = whole[self.baseline]
        fields = {field for overrides in points.values() for field in overrides}
        return {
            label: {f: values.get(f) for f in fields if values.get(f) != ours.get(f)}
            for label, values in whole.items()
        }

    def field(self, label: str, name: str):
        """Returns the value of a field of the configuration at a variant; None when unknown."""
        base = flatten(self.study.get("config") or {})
        ours = next(p for p in self.study["points"] if p["label"] == self.baseline)
        return (base | dict(ours.get("overrides") or {}) | self.changes[label]).get(name)

    def relative(self, value: float) -> float:
        """Returns a difference as a part of the baseline's mean score, or as it is where the metric
        says so."""
        return value / self.base["score"] if self.metric.relative else value

    def cache_saved(self, label: str) -> float:
        """Returns the part of the baseline's cache that a variant saves; nan when unknown."""
        ours, base = (
            self.variants.loc[name, "cache_bytes_per_token"] for name in (label, self.baseline)
        )
        return 1 - ours / base if base else math.nan

    @property
    def unit(self) -> str:
        """What intervals stand on: "seed", or "setting" where several are finished."""
        units = self.variants["unit"].dropna()
        return units.iloc[0] if len(units) else "seed"

    def equal_cache(self) -> list[pd.DataFrame]:
        """Returns the variants by cache size, where several share one smaller than the baseline's.

        A group is compared within itself by `statistics.compare_best`, on the runs that all of it
        finished; a group without such runs is left out. All groups together are corrected for.
        """
        column = "cache_bytes_per_token"
        rows = self.variants[self.variants["score"].notna() & self.variants[column].notna()]
        rows = rows[rows[column] < self.base[column]] if self.base[column] > 0 else rows.head(0)
        groups = [group for _, group in rows.groupby(column) if len(group) > 1]
        level = 1 - (1 - statistics.LEVEL) / max(1, len(groups))
        found = []
        for group in sorted(groups, key=lambda g: -g[column].iloc[0]):
            scores = self.done[self.done["label"].isin(group.index)]
            within = statistics.compare_best(scores, level)
            if within is not None:
                columns = ["score", column, "num_params"]
                found.append(group.loc[within.index, columns].join(within))
        return found

    @functools.cached_property
    def items(self) -> pd.DataFrame:
        """The sampling error of the test set: a row a compared variant with difference, low, high
        and num_items, where every compared run kept its items; empty without."""
        return _item_intervals(self)


def summarize(files: StudyFiles) -> Summary:
    """Builds the tables from the files of a study."""
    runs = results.frame(files)
    done = finished(runs)
    baseline = files.study["baseline"]
    labels = [point["label"] for point in files.study["points"]]
    labels = [baseline, *(label for label in labels if label != baseline)]
    variants = pd.DataFrame(index=pd.Index(labels, name="label"))
    by_label = done.groupby("label") if len(done) else None
    scores = _unit_scores(done)
    for label in labels:
        mine = by_label.get_group(label) if by_label and label in by_label.groups else done.head(0)
        values = scores.get(label, ())
        mean, low, high = statistics.interval(values) if len(values) else (math.nan,) * 3
        variants.loc[label, ["score", "score_low", "score_high"]] = mean, low, high
        variants.loc[label, "num_runs"] = len(mine)
        variants.loc[label, "gap"] = _gap(mine)
        for cost in COSTS:
            variants.loc[label, cost] = _common(mine, cost)
    failed = runs[(runs["status"] == "failed") & (runs["phase"] == "compare")]
    variants["num_failed"] = failed.groupby("label").size().reindex(labels).fillna(0).astype(int)
    measured = {row.get("label"): row for row in files.measured.get("rows", [])}
    for name in MEASURED:
        variants[name] = [measured.get(label, {}).get(name) for label in labels]
    relative = METRICS[_metric_key(files.study, runs)].relative
    margin = MARGIN * (variants.loc[baseline, "score"] if relative else 1)
    compared = statistics.compare(done, baseline, margin) if len(done) else _nothing()
    variants = variants.join(compared)
    curves = results.curves_frame(files)
    return Summary(files, runs, curves[curves["phase"] == "compare"], variants)


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs with a score that are compared."""
    return runs[(runs["status"] == "done") & (runs["phase"] == "compare")]


def _nothing() -> pd.DataFrame:
    return pd.DataFrame(columns=statistics.COLUMNS, index=pd.Index([], name="label"))


def _unit_scores(done: pd.DataFrame) -> dict[str, np.ndarray]:
    """Returns label -> independent scores: of seeds, or means of settings."""
    unit = "setting" if done["setting"].nunique() > 1 else "seed"
    means = done.groupby(["label", unit])["score"].mean()
    return {label: means[label].to_numpy() for label in means.index.get_level_values(0).unique()}


def _gap(mine: pd.DataFrame) -> float:
    if "train_score" not in mine:
        return math.nan
    return float((mine["score"] - pd.to_numeric(mine["train_score"], errors="coerce")).mean())


def _common(mine: pd.DataFrame, cost: str) -> float:
    """Returns what all runs of a variant have in common; settings of several sizes have nothing."""
    values = mine[cost].unique() if cost in mine else ()
    return float(values[0]) if len(values) == 1 and values[0] is not None else math.nan


def _metric_key(study: dict, runs: pd.DataFrame) -> str:
    """Returns the metric of the results; without one, of the study's evaluator."""
    known = sorted(set(runs["metric"].dropna()) & METRICS.keys())
    if len(known) > 1:
        raise UserError(f"results.jsonl mixes the scores {', '.join(known)}: start anew")
    kind = flatten(study.get("config") or {}).get("evals.eval.kind")
    return next(iter(known), "error" if kind == "accuracy" else "bits_per_byte")


def _item_intervals(summary: Summary) -> pd.DataFrame:
    kept = {}
    for run in summary.done.itertuples():
        found = results.items(summary.files.workdir / str(getattr(run, "workdir", None)))
        if found is not None:
            kept[run.label, run.setting, run.seed] = found
    rows = {}
    labels = summary.compared.index
    for label in labels:
        sums = _paired_items(summary, kept, label)
        if sums is None:
            return pd.DataFrame()
        values = sums[["base", "ours"]].to_numpy().T
        weights = sums["weight"].to_numpy()
        interval = statistics.bootstrap_items(values, weights, comparisons=len(labels))
        rows[label] = [*interval, len(sums)]
    columns = ["difference", "low", "high", "num_items"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _paired_items(
    summary: Summary, kept: dict[tuple, pd.DataFrame], label: str
) -> pd.DataFrame | None:
    """Returns the items of a variant and of the baseline, summed over the seeds that both finished:
    columns base, ours and weight, indexed by setting and item. None where a run lacks its items or
    has others.

    Args:
      kept: (label, setting, seed) -> items of a run.
    """
    runs = summary.done.set_index("label")[["setting", "seed"]]
    both = runs.loc[[label]].merge(runs.loc[[summary.baseline]])
    total = None
    for setting, seed in both.itertuples(index=False):
        ours = kept.get((label, setting, seed))
        base = kept.get((summary.baseline, setting, seed))
        if ours is None or base is None or not ours.index.equals(base.index):
            return None
        here = ours.rename(columns={"value": "ours"}).assign(base=base["value"])
        here.index = pd.MultiIndex.from_product([[setting], here.index])
        total = here if total is None else total.add(here, fill_value=0)
    return total


def write_csv(summary: Summary, path: Path) -> None:
    """Writes results.csv, a line a variant; unknown values are empty."""
    variants = summary.variants
    fields = sorted({name for changes in summary.changes.values() for name in changes})
    table = pd.DataFrame({"label": variants.index})
    for name in fields:
        table[name] = [summary.field(label, name) for label in variants.index]
    table["metric"] = summary.metric.key
    for name, column in {
        "num_seeds": "num_runs",
        "score": "score",
        "ci_low": "score_low",
        "ci_high": "score_high",
        "difference": "difference",
        "difference_low": "low",
        "difference_high": "high",
        "verdict": "verdict",
        "smallest_detectable_effect": "detectable",
        "equivalent": "equivalent",
        "ties": "ties",
        "ceiling": "ceiling",
        "train_validation_gap": "gap",
        "num_params": "num_params",
        "flops_per_token": "train_flops_per_token",
        "cache_bytes_per_token": "cache_bytes_per_token",
        "peak_bytes": "peak_bytes",
    }.items():
        table[name] = variants[column].to_numpy()
    alone = variants["verdict"].isna().to_numpy()
    table.loc[alone, "verdict"] = "not run"
    table.loc[table["label"] == summary.baseline, "verdict"] = "baseline"
    for name in ("accuracy", "class_accuracy", "solved"):
        if name in summary.done:
            means = summary.done.groupby("label")[name].mean()
            table[name] = means.reindex(variants.index).to_numpy()
    for name in ("step_ratio", "decode_ratio"):
        table[name] = [value[0] if value else None for value in variants[name]]
    if len(summary.items):
        items = summary.items.reindex(variants.index)
        for name in ("low", "high"):
            table[f"items_{name}"] = items[name].to_numpy()
    for name in ("num_seeds", "ties", "num_params", "cache_bytes_per_token", "peak_bytes"):
        table[name] = pd.to_numeric(table[name]).astype("Int64")
    table.to_csv(path, index=False, lineterminator="\n")
