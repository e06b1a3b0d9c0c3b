"""Shows a running study: one line per finished run, and on a terminal a table of running ones."""

from __future__ import annotations

import sys
import time

from qkvjax.files import read_lines
from qkvjax.progress import duration
from qkvjax.studies.grid import Study
from qkvjax.studies.task import Task


class Live:
    """Progress of the pending tasks.

    Args:
      study: whose runs they are.
      pending: the tasks of this call.
      expected: seconds that all of them should take.
      jobs: runs at a time.
    """

    def __init__(self, study: Study, pending: list[Task], expected: float, jobs: int):
        self._study = study
        self._pending = pending
        self._expected = expected
        self._jobs = jobs
        self._began = time.monotonic()
        self._ended: list[tuple[Task, float]] = []  # runs and the seconds that they took
        self._name_width = max((len(task.name) for task in pending), default=0)
        self._is_terminal = sys.stdout.isatty()
        self._rows = 0  # height of the table on the screen

    def expected_run(self, task: Task, estimate: float) -> float:
        """Returns the seconds that one more run should take.

        Args:
          task: the run.
          estimate: seconds of its training on the whole machine, used until a run has ended.
        """
        if not self._ended:
            return estimate * self._jobs
        fixed, per_work = self._pace()
        return fixed + per_work * task.work

    def left(self) -> float:
        """Returns the seconds until the last run ends, from the pace of those that ended."""
        if not self._ended:
            return max(0.0, self._expected - (time.monotonic() - self._began))
        fixed, per_work = self._pace()
        numbers = {task.number for task, _ in self._ended}
        remaining = [task.work for task in self._pending if task.number not in numbers]
        return (fixed * len(remaining) + per_work * sum(remaining)) / self._jobs

    def _pace(self) -> tuple[float, float]:
        """Returns the seconds of a run that do not depend on its work, and the seconds per work.

        The first are imports and compilation; 0.8 of the shortest run stands for them.
        """
        seconds = [taken for _, taken in self._ended]
        fixed = 0.8 * min(seconds)
        work = sum(task.work for task, _ in self._ended)
        return fixed, (sum(seconds) - fixed * len(seconds)) / work

    def drop(self, tasks: list[Task]) -> None:
        """Removes tasks that need no training from the count."""
        numbers = {task.number for task in tasks}
        self._pending = [task for task in self._pending if task.number not in numbers]

    def finished(self, task: Task, line: dict, seconds: float) -> None:
        """Counts and prints a run that ended.

        Args:
          task: the run.
          line: its line of results.jsonl.
          seconds: how long it took.
        """
        self._ended.append((task, seconds))
        if line["status"] == "done":
            outcome = f"{line['score']:.4f} {self._metric_name}"
        else:
            outcome = f"failed: {line['error'].splitlines()[0]}"
        self._name_width = max(self._name_width, len(task.name))
        total = str(len(self._pending))
        setting = f"{task.setting}  " if task.setting else ""
        left = f", about {duration(self.left())} left" if self.left() else ""
        self.close()
        print(
            f"[{len(self._ended):>{len(total)}}/{total}] {task.name:<{self._name_width}}  {setting}"
            f"seed {task.seed}  {outcome}  {duration(seconds)}{left}",
            flush=True,
        )

    def show(self, running: list[Task]) -> None:
        """Redraws the table of running tasks; does nothing where stdout is not a terminal."""
        if not self._is_terminal:
            return
        self.close()
        lines = [self._row(task) for task in running]
        lines.append(f"  about {duration(self.left())} left")
        print("\n".join(lines), flush=True)
        self._rows = len(lines)

    def close(self) -> None:
        """Removes the table from the screen."""
        if self._rows:
            print(f"\033[{self._rows}A\033[J", end="")
            self._rows = 0

    def _row(self, task: Task) -> str:
        """Returns the table's line of one running task, from its metrics.jsonl."""
        records = read_lines(self._study.workdir / task.folder / "metrics.jsonl")
        step = records[-1].get("step", 0) if records else 0
        loss = _latest(records, "train/loss")
        score = _latest(records, f"eval/{self._study.metric}")
        return (
            f"  {task.name:<{self._name_width}}  seed {task.seed}  step {step:>7,}"
            f"  loss {loss:7.4f}  {self._metric_name} {score:7.4f}"
        )

    @property
    def _metric_name(self) -> str:
        return self._study.metric.replace("_", " ")


def _latest(records: list[dict], key: str) -> float:
    """Returns the last value of a key in records, nan if there is none."""
    values = [record[key] for record in records if key in record]
    return values[-1] if values else float("nan")
