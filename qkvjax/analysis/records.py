"""Reads what a study left in its workdir: study.json, results.jsonl, measurements.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from qkvjax import sweep
from qkvjax.errors import UserError, parse_object, read_object


class Records(NamedTuple):
    """The files of a study, checked.

    Attributes:
      study: study.json.
      results: (label, seed) -> the last line that results.jsonl has for it; where the study has
        settings, the seed is "SETTING, seed SEED".
      measurements: label -> its row of measurements.json; empty when there is none.
      measured: measurements.json without its rows.
      memory: what `qkvjax bench memory` wrote into the workdir; empty when it did not.
      notes: what a reader must know about the files, one sentence each.
    """

    study: dict
    results: dict[tuple[str, int], dict]
    measurements: dict[str, dict]
    measured: dict
    memory: list[dict]
    notes: list[str]


def read(workdir: Path) -> Records:
    """Reads the workdir of a study.

    Raises:
      UserError: there is no readable study.json.
    """
    workdir = Path(workdir)
    study = _read_study(workdir / "study.json")
    notes: list[str] = []
    lines = _read_lines(workdir / "results.jsonl", notes)
    labels = [point["label"] for point in study["points"]]
    settings = study.get("settings") or [""]
    results, strangers = {}, 0
    for line in (line for line in lines if _is_compared(line, study)):
        seed, setting = line.get("seed"), line.get("setting") or ""
        if line.get("label") in labels and seed in study["seeds"] and setting in settings:
            key = f"{setting}, seed {seed}" if setting else seed
            results[line["label"], key] = _checked(line)
        else:
            strangers += 1
    if strangers:
        notes.append(
            f"{strangers} lines of results.jsonl belong to variants, settings or seeds that this"
            " study does not name; they are left out."
        )
    measured = _read_measurements(workdir / "measurements.json", notes)
    rows = {row["label"]: row for row in measured.pop("rows", []) if "label" in row}
    bench = workdir / "bench.jsonl"
    lines = _read_lines(bench, notes) if bench.exists() else []
    memory = [line for line in lines if line.get("what") == "memory"]
    return Records(study, results, rows, measured, memory, notes)


def _is_compared(line: dict, study: dict) -> bool:
    """Whether a line is none of a tuned study that only chose a value, or of a value that another
    choice replaced."""
    if line.get("phase") == "tune":
        return False
    if "tuned" not in study:
        return True
    tuned = study["tuned"]
    if line.get("phase") == "compare":
        chosen = {(row["label"], row["setting"]): row["value"] for row in tuned["chosen"]}
        group = (line.get("label"), line.get("setting") or "")
        return group not in chosen or line.get("tuned") == chosen[group]
    # Runs of an ordinary study that were taken over have lines of their own.
    names = {
        sweep.tuned_label(point["label"], tuned["field"], value)
        for point in study["points"]
        for value in tuned["values"]
    }
    return line.get("label") not in names


def _read_study(path: Path) -> dict:
    remedy = "run `qkvjax study` in this workdir first, or restore the file from a copy"
    study = read_object(path, remedy)
    try:
        labels = [point["label"] for point in study["points"]]
        found = study["baseline"] in labels
        list(study["seeds"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} describes no study (it lacks {error}): {remedy}") from None
    if not found:
        raise UserError(
            f"{path}: the baseline {study['baseline']!r} is none of the points"
            f" {', '.join(labels)}: name one of them"
        )
    return study


def _read_lines(path: Path, notes: list[str]) -> list[dict]:
    """The objects of a JSONL file; lines that are none are counted in a note."""
    if not path.exists():
        notes.append("There is no results.jsonl: no run has ended yet.")
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    objects, broken = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        value = parse_object(line)
        if value is None:
            broken.append(number)
        else:
            objects.append(value)
    if broken:
        where = f"Unreadable lines of results.jsonl: {', '.join(map(str, broken))}"
        if broken == [len(lines)]:
            where = "The last line of results.jsonl is cut short (a run was stopped while it wrote)"
        notes.append(f"{where}; what it said is not in this report.")
    return objects


def _read_measurements(path: Path, notes: list[str]) -> dict:
    if not path.exists():
        return {}
    try:
        value = read_object(path)
    except UserError as error:
        notes.append(f"measurements.json is unreadable ({error}); its columns say “not measured”.")
        return {}
    rows = value.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        notes.append("measurements.json is damaged; its columns say “not measured”.")
        return {}
    return value


def _checked(line: dict) -> dict:
    """A result line; one without a finite score counts as failed."""
    score = line.get("score")
    finite = isinstance(score, (int, float)) and math.isfinite(score)
    if line.get("status") == "done" and not finite:
        return line | {"status": "failed", "error": f"the score is {score}, not a finite number"}
    return line
