"""The processes of a study: measuring first, then runs side by side.

Each run is a process of its own, `qkvjax study ... --point=K`: a crash takes nothing with it,
and a job array does the same with other means. On CPU each process is pinned to a core: small
models train faster on one core than on two. On GPUs and TPUs each of several gets devices of its
own (`studies.devices`).
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

from qkvjax import sweep
from qkvjax.errors import UserError
from qkvjax.files import append_line, read_json, write_json
from qkvjax.parallel.mesh import idle_devices
from qkvjax.progress import duration
from qkvjax.studies import devices
from qkvjax.studies.grid import Study
from qkvjax.studies.live import Live
from qkvjax.studies.point import failure, take_over
from qkvjax.studies.task import Task
from qkvjax.studies.tuning import TUNE

OVERHEAD_SECONDS = 16.0  # of a run's process: imports, compilation, evaluations, saving
POLL_SECONDS = 0.5
TERMINATED = 143  # what the shell says of a program that SIGTERM ended


def measure_here(study: Study) -> int:
    """Writes measurements.json: what each point costs on this machine."""
    from qkvjax.costs.measure import measure

    found = measure(study.configs(), log=lambda line: print(line, flush=True))
    write_json(study.workdir / "measurements.json", found | {"labels": study.labels})
    return 0


def run_all(
    study: Study, arguments: list[str], *, jobs: int | None, max_seconds: float | None
) -> int:
    """Trains everything that is pending; returns how many runs failed.

    Args:
      arguments: the study's own command line, which its processes get with --point=K.
      jobs: processes at a time; None means one a core on CPU, else one. On accelerators there are
        at most as many as devices.
      max_seconds: no run starts that would probably end later than this.
    """
    began = time.monotonic()
    take_over(study, study.tasks)
    pending = study.pending()
    if not pending:
        print(f"all {len(study)} runs are finished")
        return 0
    print(f"{_factors(study)}: {len(study)} runs, {len(study) - len(pending)} finished")
    here = devices.find()
    on_cpu = here.platform == "cpu"
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    if on_cpu:
        jobs = min(jobs or len(cores), len(pending))
    else:
        jobs = _on_accelerators(jobs, here, pending)
    slots = devices.environments(here, jobs)
    measured = _measurements(study, arguments, slots[0])
    each = _estimates(study, measured)
    expected = sum(each[task.label] for task in pending) + OVERHEAD_SECONDS * len(pending) / jobs
    told = f"about {duration(expected)} for " if measured else ""
    print(f"{told}{len(pending)} runs, {jobs} at a time", flush=True)

    # A job's end by SIGTERM must not leave its runs behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    live = Live(study, pending, expected, jobs)
    waiting = [task for task in pending if not task.waits]
    blocked = [task for task in pending if task.waits]
    running, failed, skipped = {}, 0, 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                left = None if max_seconds is None else max_seconds - (time.monotonic() - began)
                if left is not None and live.expected_run(task, each[task.label]) > left:
                    skipped += 1
                    continue
                free = next(slot for slot in range(jobs) if slot not in running)
                core = cores[free % len(cores)] if on_cpu and jobs > 1 else None
                known = len(study.lines())
                process = _start(study, task, arguments, core, slots[free])
                running[free] = (task, process, time.monotonic(), known)
            time.sleep(POLL_SECONDS)
            for slot, (task, process, since, known) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                line = _outcome(study, task, process.returncode, known)
                failed += line["status"] == "failed"
                live.finished(task, line, time.monotonic() - since)
                if blocked and task.phase == TUNE:
                    blocked, released = _released(study, blocked, live)
                    waiting += released
            live.show([task for task, *_ in running.values()])
    except BaseException:
        for _, process, *_ in running.values():
            process.terminate()
        for _, process, *_ in running.values():
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        live.close()
    study.claim("", keep_command=True)  # with the environment that the runs tell
    if not skipped and not failed and not blocked:
        shutil.rmtree(study.workdir / ".compiled", ignore_errors=True)
    if skipped:
        print(
            f"--max_seconds={max_seconds:g} left no time for {skipped} runs;"
            " the same command goes on with them"
        )
    if blocked:
        print(_why_blocked(study, blocked))
    return failed


def _factors(study: Study) -> str:
    """What multiplies to the runs of a study: "5 variants x 3 seeds"."""
    points = f"{len(study.points)} variants"
    if len(study.settings) > 1:
        points += f" x {len(study.settings)} settings"
    seeds = f"{len(study.seeds)} seeds"
    if study.tuning is None:
        return f"{points} x {seeds}"
    values = f"{len(study.tuning.values)} values of {sweep.last_part(study.tuning.field)}"
    tried = f"{values} x {len(study.tuning.seeds)} tuning seeds"
    return f"{points} x ({tried}, then the best value x {seeds})"


def _released(study: Study, blocked: list[Task], live: Live) -> tuple[list[Task], list[Task]]:
    """Divides runs that waited for tuning into those that still wait and those to train now."""
    tasks = study.tasks
    known = [tasks[task.number] for task in blocked]
    ready = [task for task in known if not task.waits]
    done = study.done(ready) if ready else {}
    finished = [task for task in ready if task.identity in done]
    take_over(study, finished)
    live.drop(finished)
    still = [task for task in known if task.waits]
    return still, [task for task in ready if task.identity not in done]


def _why_blocked(study: Study, blocked: list[Task]) -> str:
    """A sentence about runs that were not trained because their value is not known."""
    labels = ", ".join(dict.fromkeys(task.label for task in blocked))
    return (
        f"{len(blocked)} runs of {labels} wait for tuning runs that are not finished; the same"
        " command tries these again; where a value always fails, remove it from"
        " config.study.tuned.values"
    )


def _on_accelerators(asked: int | None, here: devices.Devices, pending: list[Task]) -> int:
    """The runs at a time on accelerators; says which devices are left idle, and how to use them."""
    meshes = [task.config.mesh.sizes for task in pending]
    jobs = devices.jobs_at_a_time(asked, here, meshes)
    count = len(here.ids)
    if asked and asked > jobs:
        print(f"--jobs={asked}: {count} devices are here, so {jobs} runs at a time")
    jobs = min(jobs, len(pending))
    if jobs == 1 and (idle := idle_devices(meshes[0], count)):
        print(idle)
    return jobs


def _measurements(study: Study, arguments: list[str], environment: dict[str, str]) -> dict:
    """measurements.json, measured in a process of its own when it is not there."""
    if len(study.settings) > 1 or study.base["model"]["kind"] != "lm":
        return {}  # each setting has costs of its own; encoders decode nothing
    path = study.workdir / "measurements.json"
    found = read_json(path)
    if found.get("labels") == study.labels:
        return found
    print("measuring what each variant costs on this machine", flush=True)
    log = study.workdir / "measure.log"
    command, options = _door(study, arguments, "--measure", environment)
    if code := _watch(command, options, log, len(study.labels)):
        print(f"  that failed (exit code {code}, see {log}); the report will say not measured")
        return found
    found = read_json(path)
    study.claim("", keep_command=True)  # with the environment that was measured in
    return found


def _watch(command: list[str], options: dict, log: Path, count: int) -> int:
    """Runs the measuring process, shows how far it is, and returns its exit code.

    Args:
      log: gets what it prints.
      count: variants that it measures.
    """
    shown = 0

    def show():
        nonlocal shown
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        compiled = [line for line in lines if line.startswith("compiled ")]
        for line in compiled[shown:]:
            shown += 1
            then = "; timing all of them side by side" if shown == count else ""
            print(f"  {line}, {shown} of {count}{then}", flush=True)

    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **options)
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            show()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    show()
    return process.returncode


def _estimates(study: Study, measured: dict) -> dict[str, float]:
    """Seconds of training of one run of each label, 0 where nothing is known."""
    step = {row["label"]: row["step_seconds"] for row in measured.get("rows", [])}
    steps = measured.get("steps", 0)
    return {label: step.get(label, 0.0) * steps for label in study.labels}


def _start(
    study: Study, task: Task, arguments: list[str], core: int | None, environment: dict[str, str]
) -> subprocess.Popen:
    folder = study.workdir / task.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}): remove what is in its way"
        ) from None
    command, options = _door(study, arguments, f"--point={task.number}", environment)
    pin = None if core is None else lambda: os.sched_setaffinity(0, {core})
    with (folder / "train.log").open("a") as log:
        options |= {"stdout": log, "stderr": subprocess.STDOUT, "preexec_fn": pin}
        return subprocess.Popen(command, **options)


def _door(
    study: Study, arguments: list[str], flag: str, environment: dict[str, str]
) -> tuple[list[str], dict]:
    """The command and the environment of this study's door in a process of its own.

    With -P the current folder holds no modules: a random.py there is not the library's. The seeds
    of a variant run one program, which the first of them compiles.
    """
    here = str(Path(__file__).parents[2])
    paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", "qkvjax", "study", *arguments, flag]
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(_compiled(study)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return command, {"env": compiled | os.environ | {"PYTHONPATH": paths} | environment}


def _compiled(study: Study) -> Path:
    """Where compiled programs are kept: they run on machines with this one's instructions."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return study.workdir / ".compiled" / f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"


def _outcome(study: Study, task: Task, code: int, known: int) -> dict:
    """The run's line; a process that died without writing one gets a line here.

    The first `known` lines of the results are of earlier attempts.
    """
    lines = [line for line in study.lines()[known:] if line["identity"] == task.identity]
    if lines and (code == 0) == (lines[-1]["status"] == "done"):
        return lines[-1]
    log = study.workdir / task.folder / "train.log"
    told = (
        log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if log.exists()
        else []
    )
    last = f" ({told[-1]})" if told else ""
    error = f"the process ended with code {code}{last}: see {task.folder}/train.log"
    line = failure(study, task, error)
    append_line(study.results, line)
    return line
