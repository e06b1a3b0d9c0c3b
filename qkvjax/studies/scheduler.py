"""Trains the runs of a study side by side, each in a process of its own.

Such a process is `qkvjax study ... --point=K`. If it crashes the other runs go on, and a job array
of a cluster can start the same command. On CPU each process is pinned to one core: small models
train faster on one core than on two. On GPUs and TPUs each process gets its own devices
(`studies.devices`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from qkvjax import sweep
from qkvjax.files import append_line
from qkvjax.parallel.mesh import idle_devices
from qkvjax.progress import duration
from qkvjax.studies import devices, measurements, processes
from qkvjax.studies.grid import Study
from qkvjax.studies.live import Live
from qkvjax.studies.point import failure, take_over
from qkvjax.studies.processes import Slot
from qkvjax.studies.task import Task
from qkvjax.studies.tuning import TUNE

OVERHEAD_SECONDS = 16.0  # of one run, beside training: imports, compilation, evaluations, saving
TERMINATED = 143  # exit code that shells give to a program ended by SIGTERM


def run_all(
    study: Study, arguments: list[str], *, jobs: int | None, max_seconds: float | None
) -> int:
    """Trains every pending run; returns how many failed.

    Args:
      study: the runs.
      arguments: command line of the study, which each process gets with --point=K.
      jobs: runs at a time; None means one per core on CPU and one on accelerators. There are never
        more than accelerators.
      max_seconds: a run that would probably end later than this is not started.
    """
    began = time.monotonic()
    take_over(study, study.tasks)
    pending = study.pending()
    if not pending:
        print(f"all {len(study)} runs are finished")
        return 0
    print(f"{_factors(study)}: {len(study)} runs, {len(study) - len(pending)} finished")
    slots = _slots(jobs, devices.find(), pending)
    measured = measurements.read_or_measure(study, arguments, slots[0].environment)
    estimates = measurements.training_seconds(study, measured)
    expected = sum(estimates[task.label] for task in pending)
    expected += OVERHEAD_SECONDS * len(pending) / len(slots)
    start = f"about {duration(expected)} for " if measured else ""
    print(f"{start}{len(pending)} runs, {len(slots)} at a time", flush=True)

    live = Live(study, pending, expected, len(slots))
    deadline = None if max_seconds is None else began + max_seconds
    schedule = _Schedule(study, arguments, pending, slots, estimates, live, deadline)
    with _sigterm_exits():
        schedule.run()
    study.claim("", keep_command=True)  # adds the environment of the runs to study.json
    if not schedule.skipped and not schedule.failed and not schedule.blocked:
        shutil.rmtree(study.workdir / ".compiled", ignore_errors=True)
    if schedule.skipped:
        print(
            f"--max_seconds={max_seconds:g} left no time for {schedule.skipped} runs;"
            " the same command continues with them"
        )
    if schedule.blocked:
        print(_why_blocked(schedule.blocked))
    return schedule.failed


class _Running(NamedTuple):
    """A run in progress.

    Attributes:
      task: the run.
      process: the process that trains it.
      began: `time.monotonic()` at its start.
      num_lines: lines of results.jsonl at its start, which are from earlier attempts.
    """

    task: Task
    process: subprocess.Popen
    began: float
    num_lines: int


class _Schedule:
    """The runs of one call: which wait for a slot, which wait for tuning, which are in progress.

    Args:
      study: whose runs they are.
      arguments: command line of the study.
      pending: the tasks to train.
      slots: one for each of the runs at a time.
      estimates: label -> expected seconds of training of one run.
      live: shows the progress.
      deadline: no run starts that would probably end later, by `time.monotonic()`; None: no limit.
    """

    def __init__(
        self,
        study: Study,
        arguments: list[str],
        pending: list[Task],
        slots: list[Slot],
        estimates: dict[str, float],
        live: Live,
        deadline: float | None,
    ):
        self.study = study
        self.arguments = arguments
        self.slots = slots
        self.estimates = estimates
        self.live = live
        self.deadline = deadline
        self.waiting = [task for task in pending if not task.waits]
        self.blocked = [task for task in pending if task.waits]
        self.running: dict[int, _Running] = {}  # slot number -> what runs in it
        self.failed = 0
        self.skipped = 0

    def run(self) -> None:
        """Trains until nothing can start any more; ends all processes if it is interrupted."""
        try:
            while self.waiting or self.running:
                self._fill_slots()
                time.sleep(processes.POLL_SECONDS)
                self._collect()
                self.live.show([run.task for run in self.running.values()])
        except BaseException:
            for run in self.running.values():
                run.process.terminate()
            for run in self.running.values():
                run.process.wait()
            raise
        finally:
            self.live.close()

    def _fill_slots(self) -> None:
        """Starts waiting runs in free slots."""
        while self.waiting and len(self.running) < len(self.slots):
            task = self.waiting.pop(0)
            if self._would_end_late(task):
                self.skipped += 1
                continue
            free = next(number for number in range(len(self.slots)) if number not in self.running)
            num_lines = len(self.study.lines())
            process = processes.start_run(self.study, task, self.arguments, self.slots[free])
            self.running[free] = _Running(task, process, time.monotonic(), num_lines)

    def _would_end_late(self, task: Task) -> bool:
        if self.deadline is None:
            return False
        seconds = self.live.expected_run(task, self.estimates[task.label])
        return seconds > self.deadline - time.monotonic()

    def _collect(self) -> None:
        """Takes the runs that ended out of their slots and releases what waited for them."""
        for slot, run in list(self.running.items()):
            if run.process.poll() is None:
                continue
            del self.running[slot]
            line = _result_line(self.study, run)
            self.failed += line["status"] == "failed"
            self.live.finished(run.task, line, time.monotonic() - run.began)
            if self.blocked and run.task.phase == TUNE:
                self._release()

    def _release(self) -> None:
        """Moves runs whose tuned value is known by now from `blocked` to `waiting`."""
        tasks = self.study.tasks
        blocked = [tasks[task.number] for task in self.blocked]
        self.blocked = [task for task in blocked if task.waits]
        ready = [task for task in blocked if not task.waits]
        if not ready:
            return
        # With its value a run may turn out to be one that another study of this workdir finished.
        done = self.study.done(ready)
        finished = [task for task in ready if task.identity in done]
        take_over(self.study, finished)
        self.live.drop(finished)
        self.waiting += [task for task in ready if task.identity not in done]


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Raises SystemExit at SIGTERM, so that the end of a job ends its runs too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _slots(requested: int | None, machine: devices.Devices, pending: list[Task]) -> list[Slot]:
    """Returns a slot for each of the runs at a time.

    Args:
      requested: --jobs.
      machine: devices of this machine.
      pending: the tasks to train.
    """
    if machine.platform != "cpu":
        jobs = _jobs_on_accelerators(requested, machine, pending)
        return [Slot(variables, None) for variables in devices.environments(machine, jobs)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    jobs = min(requested or len(cores), len(pending))
    if jobs == 1:
        return [Slot({}, None)]
    return [Slot({}, cores[number % len(cores)]) for number in range(jobs)]


def _jobs_on_accelerators(
    requested: int | None, machine: devices.Devices, pending: list[Task]
) -> int:
    """Returns the runs at a time on accelerators; prints how to use devices that stay idle."""
    meshes = [task.config.mesh.sizes for task in pending]
    jobs = devices.jobs_at_a_time(requested, machine, meshes)
    count = len(machine.ids)
    if requested and requested > jobs:
        print(f"--jobs={requested}: {count} devices are here, so {jobs} runs at a time")
    jobs = min(jobs, len(pending))
    if jobs == 1 and (idle := idle_devices(meshes[0], count)):
        print(idle)
    return jobs


def _factors(study: Study) -> str:
    """Returns what the number of runs is the product of, such as "5 variants x 3 seeds"."""
    points = f"{len(study.points)} variants"
    if len(study.settings) > 1:
        points += f" x {len(study.settings)} settings"
    seeds = f"{len(study.seeds)} seeds"
    if study.tuning is None:
        return f"{points} x {seeds}"
    values = f"{len(study.tuning.values)} values of {sweep.last_part(study.tuning.field)}"
    tuning = f"{values} x {len(study.tuning.seeds)} tuning seeds"
    return f"{points} x ({tuning}, then the best value x {seeds})"


def _why_blocked(blocked: list[Task]) -> str:
    """Returns a sentence about runs that were not trained because their value is not known."""
    labels = ", ".join(dict.fromkeys(task.label for task in blocked))
    return (
        f"{len(blocked)} runs of {labels} wait for tuning runs that are not finished; the same"
        " command tries these again; where a value always fails, remove it from"
        " config.study.tuned.values"
    )


def _result_line(study: Study, run: _Running) -> dict:
    """Returns the line of a run that ended, and writes it if the process died without one."""
    task = run.task
    code = run.process.returncode
    lines = [line for line in study.lines()[run.num_lines :] if line["identity"] == task.identity]
    if lines and (code == 0) == (lines[-1]["status"] == "done"):
        return lines[-1]
    log = study.workdir / task.folder / "train.log"
    output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    printed = output.strip().splitlines()
    last = f" ({printed[-1]})" if printed else ""
    error = f"the process ended with code {code}{last}: see {task.folder}/train.log"
    line = failure(study, task, error)
    append_line(study.results, line)
    return line
