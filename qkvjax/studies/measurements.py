"""measurements.json of a study: what a step of each variant costs on this machine."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from qkvjax.files import read_json, write_json
from qkvjax.studies import processes
from qkvjax.studies.grid import Study


def measure_here(study: Study) -> int:
    """Measures every point in this process, writes measurements.json and returns 0."""
    from qkvjax.costs.measure import measure

    measured = measure(study.configs(), log=lambda line: print(line, flush=True))
    write_json(study.workdir / "measurements.json", measured | {"labels": study.labels})
    return 0


def read_or_measure(study: Study, arguments: list[str], environment: dict[str, str]) -> dict:
    """Returns measurements.json, which a process of its own writes first if it is missing.

    Args:
      study: what is measured; {} is returned where measuring makes no sense.
      arguments: command line of the study.
      environment: environment variables that select the devices to measure on.
    """
    if len(study.settings) > 1 or study.base["model"]["kind"] != "lm":
        return {}  # costs differ from setting to setting; encoders decode nothing
    path = study.workdir / "measurements.json"
    measured = read_json(path)
    if measured.get("labels") == study.labels:
        return measured
    print("measuring what each variant costs on this machine", flush=True)
    log = study.workdir / "measure.log"
    command, variables = processes.study_command(study, arguments, "--measure", environment)
    if code := _run_and_show(command, variables, log, len(study.labels)):
        print(f"  that failed (exit code {code}, see {log}); the report will say not measured")
        return measured
    measured = read_json(path)
    study.claim("", keep_command=True)  # adds the environment of the measurement to study.json
    return measured


def training_seconds(study: Study, measured: dict) -> dict[str, float]:
    """Returns {label: expected seconds of training of one run}, 0 where nothing was measured."""
    step = {row["label"]: row["step_seconds"] for row in measured.get("rows", [])}
    steps = measured.get("steps", 0)
    return {label: step.get(label, 0.0) * steps for label in study.labels}


def _run_and_show(command: list[str], environment: dict[str, str], log: Path, count: int) -> int:
    """Runs the measuring process, prints its progress, and returns its exit code.

    Args:
      command: command line of the process.
      environment: its environment variables.
      log: file that its output is written to.
      count: number of variants that it measures.
    """
    shown = 0
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        while process.poll() is None:
            time.sleep(processes.POLL_SECONDS)
            shown = _show_compiled(log, shown, count)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    _show_compiled(log, shown, count)
    return process.returncode


def _show_compiled(log: Path, shown: int, count: int) -> int:
    """Prints the variants compiled since the last call; returns how many are printed by now."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    compiled = [line for line in lines if line.startswith("compiled ")]
    for number, line in enumerate(compiled[shown:], shown + 1):
        then = "; timing all of them side by side" if number == count else ""
        print(f"  {line}, {number} of {count}{then}", flush=True)
    return len(compiled)
