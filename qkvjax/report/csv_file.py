"""results.csv: a study as a table for other programs, a line for each variant."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from qkvjax.report.summary import Summary

# Column of results.csv -> column of `Summary.variants`.
_COLUMNS = {
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
}
_INTEGERS = ("num_seeds", "ties", "num_params", "cache_bytes_per_token", "peak_bytes")


def write_csv(summary: Summary, path: Path) -> None:
    """Writes results.csv; unknown values are empty.

    Its columns are label, the fields in which variants differ, metric, those of _COLUMNS, the
    means of accuracy, class_accuracy and solved where they were measured, step_ratio and
    decode_ratio, and the interval over the items of the test set where runs kept them.
    """
    variants = summary.variants
    fields = sorted({name for changes in summary.changes.values() for name in changes})
    table = pd.DataFrame({"label": variants.index})
    for name in fields:
        table[name] = [summary.field(label, name) for label in variants.index]
    table["metric"] = summary.metric.key
    for name, column in _COLUMNS.items():
        table[name] = variants[column].to_numpy()
    table.loc[variants["verdict"].isna().to_numpy(), "verdict"] = "not run"
    table.loc[table["label"] == summary.baseline, "verdict"] = "baseline"
    for name in ("accuracy", "class_accuracy", "solved"):
        if name in summary.done:
            means = summary.done.groupby("label")[name].mean()
            table[name] = means.reindex(variants.index).to_numpy()
    for name in ("step_ratio", "decode_ratio"):
        table[name] = [ratio[0] if ratio else None for ratio in variants[name]]
    if len(summary.items):
        items = summary.items.reindex(variants.index)
        for name in ("low", "high"):
            table[f"items_{name}"] = items[name].to_numpy()
    for name in _INTEGERS:
        table[name] = pd.to_numeric(table[name]).astype("Int64")
    table.to_csv(path, index=False, lineterminator="\n")
