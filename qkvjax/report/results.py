"""The results of a study as DataFrames: one with a row for each run, one for each evaluation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from qkvjax.config import flatten
from qkvjax.report import files as study_files

# The first columns, in this order. A failed run has them too, without figures.
FIRST = ("label", "setting", "seed", "phase", "status", "metric", "score")
# Nested parts of a result line. They are no columns, but the entries of some of them are.
NESTED = ("overrides", "curve", "costs", "sample", "inside", "spectra")


def results(workdir: str | Path) -> pd.DataFrame:
    """Returns the runs of a study, one in each row.

    Columns:
      label: the variant.
      setting: "" in a study with one setting.
      seed: an integer.
      phase: "compare", or "tune" for the runs that chose a value in a tuned study.
      status: "done" or "failed".
      error: of a failed run.
      metric: the name of the score.
      score: lower is better.
      perplexity, accuracy, num_labels, ...: every other measure of the last evaluation.
      steps, tokens, seconds, identity, data_digest, workdir: of the run.
      model.sharing, ...: each field that some point of the study overrides.
      num_params, forward_macs, cache_bytes_per_token, train_flops_per_token: costs.
      inside/rank_q, ...: what the evaluator `inside` measured.
    A value that a run does not have is missing (NaN).

    Args:
      workdir: of a study, finished or not.

    Raises:
      UserError: the workdir is not that of a study.
    """
    return frame(study_files.read(Path(workdir)))


def curves(workdir: str | Path) -> pd.DataFrame:
    """Returns the evaluations of all finished runs of a study, one in each row.

    Columns: label, setting, seed, phase, step, tokens, seconds (of training), and the score under
    its name, such as bits_per_byte.

    Args:
      workdir: of a study.

    Raises:
      UserError: the workdir is not that of a study.
    """
    return curves_frame(study_files.read(Path(workdir)))


def frame(files: study_files.StudyFiles) -> pd.DataFrame:
    """Returns what `results` returns, from files that were read."""
    study = files.study
    base = flatten(study.get("config") or {})
    points = {point["label"]: dict(point.get("overrides") or {}) for point in study["points"]}
    fields = {field: None for overrides in points.values() for field in overrides}
    rows = []
    for line in files.lines:
        overrides = points[line["label"]] | dict(line.get("overrides") or {})
        costs = dict(line.get("costs") or {})
        rows.append(
            {name: line.get(name) for name in FIRST}
            | {name: value for name, value in line.items() if name not in NESTED}
            | {field: overrides.get(field, base.get(field)) for field in fields | overrides}
            | costs
            | {f"inside/{name}": value for name, value in (line.get("inside") or {}).items()}
            | {"train_flops_per_token": _train_flops(costs)}
        )
    table = pd.DataFrame(rows, columns=None if rows else list(FIRST))
    for name in ("score", "steps", "tokens", "seconds"):
        values = table[name] if name in table else math.nan
        table[name] = pd.to_numeric(pd.Series(values, index=table.index), errors="coerce")
    order = {label: number for number, label in enumerate(points)}
    return table.sort_values(
        ["label", "setting", "seed"],
        key=lambda column: column.map(order) if column.name == "label" else column,
        kind="stable",
        ignore_index=True,
    )


def curves_frame(files: study_files.StudyFiles) -> pd.DataFrame:
    """Returns what `curves` returns, from files that were read."""
    run = ("label", "setting", "seed", "phase")
    rows = [
        {name: line[name] for name in run} | point
        for line in files.lines
        if line.get("status") == "done"
        for point in line.get("curve") or []
    ]
    return pd.DataFrame(rows, columns=None if rows else [*run, "step", "tokens", "seconds"])


def _train_flops(costs: dict) -> float | None:
    """Returns FLOPs per token of forward and backward: 6 times the forward multiply-adds."""
    macs = costs.get("forward_macs")
    length = costs.get("seq_len")
    return 6 * macs / length if macs and length else None


def items(workdir: Path, name: str = "eval") -> pd.DataFrame | None:
    """Returns the scored items (documents, examples) of a run; None where it did not keep them.

    Args:
      workdir: of the run.
      name: of the evaluator.

    Returns:
      A frame indexed by item, with columns value and weight. The score of the run is
      sum(value) / sum(weight).
    """
    path = workdir / "items" / f"{name}.npz"
    if not path.is_file():
        return None
    with np.load(path) as arrays:
        index = pd.Index(arrays["item"], name="item")
        return pd.DataFrame({"value": arrays["value"], "weight": arrays["weight"]}, index=index)
