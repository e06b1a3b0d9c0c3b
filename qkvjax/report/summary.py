"""A study as one table with a row for each variant: scores, differences, verdicts, costs."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pandas as pd

from qkvjax.config import flatten
from qkvjax.errors import UserError
from qkvjax.report import results, statistics
from qkvjax.report.files import StudyFiles
from qkvjax.report.metric import METRICS, Metric

# Differences within this part of the baseline's score (or of the labels) count as equivalent.
MARGIN = 0.01
COSTS = ("num_params", "train_flops_per_token", "cache_bytes_per_token")
MEASURED = ("step_ratio", "step_seconds", "peak_bytes", "decode_ratio", "decode_seconds")


@dataclasses.dataclass(frozen=True)
class Summary:
    """The tables from which a report is made.

    Attributes:
      files: the files of the study.
      runs: all runs, as `results.frame` returns them.
      curves: the evaluations of the compared runs, as `results.curves_frame` returns them.
      variants: a row for each variant, the baseline first, indexed by label. Columns: score,
        score_low, score_high, num_runs, num_failed, gap (held-out score minus training score);
        COSTS, missing where the runs differ in them; MEASURED, missing where they were not
        measured; and the columns of `statistics.compare`, missing where a variant is not compared.
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
        """The score by which the variants are compared."""
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
        """Names of the settings in which every variant is trained; empty in a study with one."""
        return self.study.get("settings") or []

    @property
    def planned(self) -> int:
        """The number of runs of each variant that are compared, when all are finished."""
        return len(self.study["seeds"]) * max(1, len(self.settings))

    @functools.cached_property
    def changes(self) -> dict[str, dict]:
        """Label -> the fields in which a variant differs from the baseline, with their values."""
        points = {p["label"]: dict(p.get("overrides") or {}) for p in self.study["points"]}
        fields = {field for overrides in points.values() for field in overrides}
        baseline = self._config(self.baseline)
        changes = {}
        for label in points:
            config = self._config(label)
            changes[label] = {
                field: config.get(field)
                for field in fields
                if config.get(field) != baseline.get(field)
            }
        return changes

    def _config(self, label: str) -> dict:
        """Returns the configuration of a variant: the study's, with the point's overrides."""
        point = next(p for p in self.study["points"] if p["label"] == label)
        return flatten(self.study.get("config") or {}) | dict(point.get("overrides") or {})

    def field(self, label: str, name: str):
        """Returns the value of a field of the configuration at a variant; None when unknown."""
        return (self._config(self.baseline) | self.changes[label]).get(name)

    def relative(self, value: float) -> float:
        """Returns a difference as a part of the baseline's mean score; for a metric that is not
        relative, the difference itself."""
        return value / self.base["score"] if self.metric.relative else value

    def cache_saved(self, label: str) -> float:
        """Returns the part of the baseline's cache that a variant saves; nan when unknown."""
        size = self.variants.loc[label, "cache_bytes_per_token"]
        base_size = self.base["cache_bytes_per_token"]
        return 1 - size / base_size if base_size else math.nan

    @property
    def unit(self) -> str:
        """The independent observation of intervals: "seed", or "setting" where several are
        finished."""
        units = self.variants["unit"].dropna()
        return units.iloc[0] if len(units) else "seed"

    def equal_cache(self) -> list[pd.DataFrame]:
        """Returns a frame for each cache size below the baseline's that several variants have.

        The variants of a size are compared with the best of them by `statistics.compare_best`, on
        the runs that all of them finished; a size without such runs is left out. The intervals are
        corrected for all sizes together. The largest size comes first.
        """
        column = "cache_bytes_per_token"
        rows = self.variants[self.variants["score"].notna() & self.variants[column].notna()]
        rows = rows[rows[column] < self.base[column]] if self.base[column] > 0 else rows.head(0)
        groups = [group for _, group in rows.groupby(column) if len(group) > 1]
        level = 1 - (1 - statistics.LEVEL) / max(1, len(groups))
        frames = []
        for group in reversed(groups):  # groupby sorts by size
            scores = self.done[self.done["label"].isin(group.index)]
            compared = statistics.compare_best(scores, level)
            if compared is not None:
                columns = ["score", column, "num_params"]
                frames.append(group.loc[compared.index, columns].join(compared))
        return frames

    @functools.cached_property
    def items(self) -> pd.DataFrame:
        """Intervals over the items of the test set: a row for each compared variant, with
        difference, low, high and num_items. Empty unless every compared run kept its items."""
        return _item_intervals(self)


def summarize(files: StudyFiles) -> Summary:
    """Builds the tables from the files of a study."""
    runs = results.frame(files)
    done = finished(runs)
    baseline = files.study["baseline"]
    others = [point["label"] for point in files.study["points"] if point["label"] != baseline]
    variants = _scores_and_costs(files, runs, [baseline, *others])
    relative = METRICS[_metric_key(files.study, runs)].relative
    margin = MARGIN * (variants.loc[baseline, "score"] if relative else 1)
    if len(done):
        compared = statistics.compare(done, baseline, margin)
    else:
        compared = pd.DataFrame(columns=statistics.COLUMNS, index=pd.Index([], name="label"))
    curves = results.curves_frame(files)
    return Summary(files, runs, curves[curves["phase"] == "compare"], variants.join(compared))


def _scores_and_costs(files: StudyFiles, runs: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """Returns the columns of `Summary.variants` that need no comparison."""
    done = finished(runs)
    scores = _unit_scores(done)
    variants = pd.DataFrame(index=pd.Index(labels, name="label"))
    for label in labels:
        label_runs = done[done["label"] == label]
        values = scores.get(label, ())
        interval = statistics.interval(values) if len(values) else (math.nan, math.nan, math.nan)
        variants.loc[label, ["score", "score_low", "score_high"]] = interval
        variants.loc[label, "num_runs"] = len(label_runs)
        variants.loc[label, "gap"] = _train_gap(label_runs)
        for cost in COSTS:
            variants.loc[label, cost] = _common_value(label_runs, cost)
    failed = runs[(runs["status"] == "failed") & (runs["phase"] == "compare")]
    variants["num_failed"] = failed.groupby("label").size().reindex(labels).fillna(0).astype(int)
    measured = {row.get("label"): row for row in files.measured.get("rows", [])}
    for name in MEASURED:
        variants[name] = [measured.get(label, {}).get(name) for label in labels]
    return variants


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs that are compared and have a score."""
    return runs[(runs["status"] == "done") & (runs["phase"] == "compare")]


def _unit_scores(done: pd.DataFrame) -> dict[str, np.ndarray]:
    """Returns label -> independent scores: those of seeds, or the means of settings."""
    unit = "setting" if done["setting"].nunique() > 1 else "seed"
    means = done.groupby(["label", unit])["score"].mean()
    return {label: means[label].to_numpy() for label in means.index.get_level_values(0).unique()}


def _train_gap(runs: pd.DataFrame) -> float:
    """Returns the held-out score minus the training score, mean over runs; nan if unknown."""
    if "train_score" not in runs:
        return math.nan
    return float((runs["score"] - pd.to_numeric(runs["train_score"], errors="coerce")).mean())


def _common_value(runs: pd.DataFrame, cost: str) -> float:
    """Returns a cost that all runs of a variant have in common; nan where settings differ in it."""
    values = runs[cost].unique() if cost in runs else ()
    return float(values[0]) if len(values) == 1 and values[0] is not None else math.nan


def _metric_key(study: dict, runs: pd.DataFrame) -> str:
    """Returns the metric of the results; without results, that of the study's evaluator."""
    known = sorted(set(runs["metric"].dropna()) & METRICS.keys())
    if len(known) > 1:
        raise UserError(
            f"results.jsonl mixes the scores {', '.join(known)}: run the study in a fresh workdir"
        )
    kind = flatten(study.get("config") or {}).get("evals.eval.kind")
    return next(iter(known), "error" if kind == "accuracy" else "bits_per_byte")


def _item_intervals(summary: Summary) -> pd.DataFrame:
    """Returns `Summary.items`."""
    items = {}
    for run in summary.done.itertuples():
        frame = results.items(summary.files.workdir / str(getattr(run, "workdir", None)))
        if frame is not None:
            items[run.label, run.setting, run.seed] = frame
    rows = {}
    labels = summary.compared.index
    for label in labels:
        sums = _paired_items(summary, items, label)
        if sums is None:
            return pd.DataFrame()
        values = sums[["base", "ours"]].to_numpy().T
        weights = sums["weight"].to_numpy()
        interval = statistics.bootstrap_items(values, weights, comparisons=len(labels))
        rows[label] = [*interval, len(sums)]
    columns = ["difference", "low", "high", "num_items"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _paired_items(
    summary: Summary, items: dict[tuple, pd.DataFrame], label: str
) -> pd.DataFrame | None:
    """Returns the items of a variant and of the baseline, summed over the seeds that both finished.

    Args:
      items: (label, setting, seed) -> items of a run.

    Returns:
      Columns base, ours and weight, indexed by setting and item. None where a run did not keep its
      items or scored other items.
    """
    runs = summary.done.set_index("label")[["setting", "seed"]]
    both = runs.loc[[label]].merge(runs.loc[[summary.baseline]])
    total = None
    for setting, seed in both.itertuples(index=False):
        ours = items.get((label, setting, seed))
        base = items.get((summary.baseline, setting, seed))
        if ours is None or base is None or not ours.index.equals(base.index):
            return None
        pair = ours.rename(columns={"value": "ours"}).assign(base=base["value"])
        pair.index = pd.MultiIndex.from_product([[setting], pair.index])
        total = pair if total is None else total.add(pair, fill_value=0)
    return total
