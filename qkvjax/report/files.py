"""Reads the files of a study: study.json, results.jsonl, measurements.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from qkvjax import sweep
from qkvjax.errors import UserError
from qkvjax.files import parse_object, read_object


class StudyFiles(NamedTuple):
    """The files of a study, checked.

    Attributes:
      workdir: the folder that they were read from.
      study: study.json.
      lines: of results.jsonl, the last one of each run that belongs to the study, each with its
        setting ("" where there is one) and its phase ("compare", or "tune" in a tuned study).
      measured: measurements.json; {} when there is none.
      notes: what a reader must know about the files, one sentence each.
    """

    workdir: Path
    study: dict
    lines: list[dict]
    measured: dict
    notes: list[str]


def read(workdir: Path) -> StudyFiles:
    """Reads the workdir of a study.

    Raises:
      UserError: there is no readable study.json.
    """
    workdir = Path(workdir)
    study = _read_study(workdir / "study.json")
    notes: list[str] = []
    labels = [point["label"] for point in study["points"]]
    settings = study.get("settings") or [""]
    tuning = (study.get("tuned") or {}).get("seeds") or []
    runs: dict[tuple, dict] = {}
    others = 0
    for line in _read_lines(workdir / "results.jsonl", notes):
        if _is_replaced(line, study):
            continue
        setting = line.get("setting") or ""
        phase = line.get("phase") or "compare"
        seeds = tuning if phase == "tune" else study["seeds"]
        if line.get("label") in labels and line.get("seed") in seeds and setting in settings:
            value = str(line.get("tuned")) if phase == "tune" else None
            checked = _checked(line) | {"setting": setting, "phase": phase}
            runs[line["label"], setting, line["seed"], phase, value] = checked
        else:
            others += 1
    if others:
        notes.append(
            f"{others} lines of results.jsonl belong to variants, settings or seeds that this"
            " study does not name; they are left out."
        )
    measured = _read_measurements(workdir / "measurements.json", notes)
    return StudyFiles(workdir, study, list(runs.values()), measured, notes)


def _is_replaced(line: dict, study: dict) -> bool:
    """Tells whether a line of a tuned study is of a value that another choice replaced, or of a run
    of an ordinary study that was taken over and has a line of its own."""
    tuned = study.get("tuned")
    if not tuned or line.get("phase") == "tune":
        return False
    if line.get("phase") == "compare":
        chosen = {(row["label"], row["setting"]): row["value"] for row in tuned.get("chosen") or ()}
        group = (line.get("label"), line.get("setting") or "")
        return group in chosen and line.get("tuned") != chosen[group]
    names = {
        sweep.tuned_label(point["label"], tuned["field"], value)
        for point in study["points"]
        for value in tuned["values"]
    }
    return line.get("label") in names


def _read_study(path: Path) -> dict:
    remedy = "run `qkvjax study` in this workdir first, or restore the file from a copy"
    study = read_object(path, remedy)
    try:
        labels = [point["label"] for point in study["points"]]
        known = study["baseline"] in labels
        seeds = list(study["seeds"])
        settings = list(study.get("settings") or [])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe a study (it lacks {error}): {remedy}") from None
    for what, values in (("labels", labels), ("seeds", seeds), ("settings", settings)):
        if len({*values}) < len(values) or len({type(value) for value in values}) > 1:
            raise UserError(f"{path}: the {what} {values} must differ and be of one kind: {remedy}")
    if any(not str(setting).strip() for setting in settings):
        raise UserError(f"{path}: a setting has no name: {remedy}")
    if not known:
        raise UserError(
            f"{path}: the baseline {study['baseline']!r} is not one of the points"
            f" {', '.join(labels)}: name one of them"
        )
    return study


def _read_lines(path: Path, notes: list[str]) -> list[dict]:
    """Returns the objects of a JSONL file; lines that are not objects are counted in a note."""
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
    for row in rows:
        for name in ("step_ratio", "decode_ratio"):
            ratio = row.get(name)
            if ratio is not None and not (len(ratio) == 3 and all(map(_is_number, ratio))):
                notes.append(
                    f"measurements.json: {name} of {row.get('label')} is not a measurement."
                )
                row[name] = None
    return value


def _is_number(value) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _checked(line: dict) -> dict:
    """Returns a result line; one without a finite score counts as failed."""
    score = line.get("score")
    finite = _is_number(score)
    if line.get("status") == "done" and not finite:
        return line | {"status": "failed", "error": f"the score is {score}, not a finite number"}
    return line
