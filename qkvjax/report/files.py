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
      workdir: the folder of the files.
      study: study.json.
      lines: the results of the study's runs, from results.jsonl: the last line of each run. Each
        has a setting ("" in a study with one setting) and a phase ("compare", or "tune" in a tuned
        study).
      measured: measurements.json; {} when there is none.
      notes: sentences about what is missing or damaged, for the reader of the report.
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
    lines = _read_lines(workdir / "results.jsonl", notes)
    results = _study_results(lines, study, notes)
    measured = _read_measurements(workdir / "measurements.json", notes)
    return StudyFiles(workdir, study, results, measured, notes)


def _study_results(lines: list[dict], study: dict, notes: list[str]) -> list[dict]:
    """Returns the last line of each run of the study; counts other lines in a note."""
    labels = [point["label"] for point in study["points"]]
    settings = study.get("settings") or [""]
    tuning_seeds = (study.get("tuned") or {}).get("seeds") or []
    results: dict[tuple, dict] = {}
    num_others = 0
    for line in lines:
        if _is_replaced(line, study):
            continue
        label = line.get("label")
        setting = line.get("setting") or ""
        seed = line.get("seed")
        phase = line.get("phase") or "compare"
        seeds = tuning_seeds if phase == "tune" else study["seeds"]
        if label not in labels or setting not in settings or seed not in seeds:
            num_others += 1
            continue
        value = str(line.get("tuned")) if phase == "tune" else None
        run = (label, setting, seed, phase, value)
        results[run] = _checked(line) | {"setting": setting, "phase": phase}
    if num_others:
        notes.append(
            "The report leaves out lines of results.jsonl that belong to variants, settings or"
            f" seeds that this study does not have: {num_others}."
        )
    return list(results.values())


def _is_replaced(line: dict, study: dict) -> bool:
    """Tells whether a line of a tuned study no longer counts.

    Either the study has chosen another value since, or the line is of an ordinary study whose run
    was adopted as a tuning run: it has a second line then.
    """
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
            raise UserError(
                f"{path}: the {what} {values} must differ and have the same type: {remedy}"
            )
    if any(not str(setting).strip() for setting in settings):
        raise UserError(f"{path}: a setting has an empty name: {remedy}")
    if not known:
        raise UserError(
            f"{path}: the baseline {study['baseline']!r} is not one of the points"
            f" {', '.join(labels)}: name one of them"
        )
    return study


def _read_lines(path: Path, notes: list[str]) -> list[dict]:
    """Returns the objects of a JSONL file; a note names the lines that are not objects."""
    if not path.exists():
        notes.append("There is no results.jsonl, so no run has ended yet.")
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    objects = []
    broken = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        value = parse_object(line)
        if value is None:
            broken.append(number)
        else:
            objects.append(value)
    if broken:
        numbers = ", ".join(map(str, broken))
        problem = f"These lines of results.jsonl are unreadable: {numbers}."
        if broken == [len(lines)]:
            problem = "The last line of results.jsonl is cut short: a run was stopped as it wrote."
        notes.append(f"{problem} The report leaves this out.")
    return objects


def _read_measurements(path: Path, notes: list[str]) -> dict:
    if not path.exists():
        return {}
    try:
        value = read_object(path)
    except UserError as error:
        notes.append(
            f"measurements.json is unreadable ({error}); the report says “not measured” instead."
        )
        return {}
    rows = value.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        notes.append("measurements.json is damaged; the report says “not measured” instead.")
        return {}
    for row in rows:
        for name in ("step_ratio", "decode_ratio"):
            ratio = row.get(name)
            if ratio is not None and not (len(ratio) == 3 and all(map(_is_number, ratio))):
                notes.append(
                    f"measurements.json: {name} of {row.get('label')} is not a list of three"
                    " numbers and is left out."
                )
                row[name] = None
    return value


def _is_number(value) -> bool:
    """Tells whether a JSON value is a finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _checked(line: dict) -> dict:
    """Returns a result line; one that finished without a finite score counts as failed."""
    score = line.get("score")
    if line.get("status") == "done" and not _is_number(score):
        return line | {"status": "failed", "error": f"the score is {score}, not a finite number"}
    return line
