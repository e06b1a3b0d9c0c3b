"""What a study shows while it runs: a table on a terminal, a line a finished run elsewhere."""

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
        self.study, self.pending, self.jobs = study, pending, jobs
        self.metric, self._key = study.metric.replace("_", " "), f"eval/{study.metric}"
        self.expected, self.began = expected, time.monotonic()
        self.done: list[tuple[Task, dict, float]] = []
        self._width = max((len(task.name) for task in pending), default=0)
        self._rows = 0
        self._terminal = sys.stdout.isatty()

    def expected_run(self, task: Task, estimate: float) -> float:
        """Seconds that one more run should take."""
        fixed, rate = self._pace()
        return fixed + rate * task.work if fixed else estimate * self.jobs

    def left(self) -> float:
        """Seconds until the end: from the runs that ended, or the estimate before any has."""
        if not self.done:
            return max(0.0, self.expected - (time.monotonic() - self.began))
        fixed, rate = self._pace()
        ended = {task.number for task, _, _ in self.done}
        to_come = [task.work for task in self.pending if task.number not in ended]
        return (fixed * len(to_come) + rate * sum(to_come)) / self.jobs

    def _pace(self) -> tuple[float, float]:
        """Seconds that a run takes whatever it trains, and seconds for each unit of its work: most
        of the shortest run is taken for the first."""
        taken = [seconds for _, _, seconds in self.done]
        if not taken:
            return 0.0, 0.0
        fixed = 0.8 * min(taken)
        return fixed, (sum(taken) - fixed * len(taken)) / sum(t.work for t, _, _ in self.done)

    def drop(self, tasks: list[Task]) -> None:
        """Takes runs that need not be trained out of the count."""
        numbers = {task.number for task in tasks}
        self.pending = [task for task in self.pending if task.number not in numbers]

    def finished(self, task: Task, line: dict, seconds: float) -> None:
        """Takes note of a run that ended, and prints it."""
        self.done.append((task, line, seconds))
        if line["status"] == "done":
            told = f"{line['score']:.4f} {self.metric}"
        else:
            told = f"failed: {line['error'].splitlines()[0]}"
        self._width = max(self._width, len(task.name))
        self._clear()
        print(
            f"[{len(self.done):>{len(str(len(self.pending)))}}/{len(self.pending)}]"
            f" {task.name:<{self._width}}  {task.setting}{'  ' * bool(task.setting)}"
            f"seed {task.seed}  {told}  {duration(seconds)}"
            + (f", about {duration(self.left())} left" if self.left() else ""),
            flush=True,
        )

    def show(self, running: list[Task]) -> None:
        """Redraws the table of running tasks, on a terminal."""
        if not self._terminal:
            return
        self._clear()
        lines = []
        for task in running:
            records = read_lines(self.study.workdir / task.folder / "metrics.jsonl")
            last = records[-1] if records else {}
            losses = [r["train/loss"] for r in records if "train/loss" in r]
            scores = [r[self._key] for r in records if self._key in r]
            lines.append(
                f"  {task.name:<{self._width}}  seed {task.seed}  step {last.get('step', 0):>7,}"
                f"  loss {losses[-1] if losses else float('nan'):7.4f}"
                f"  {self.metric} {scores[-1] if scores else float('nan'):7.4f}"
            )
        lines.append(f"  about {duration(self.left())} left")
        print("\n".join(lines), flush=True)
        self._rows = len(lines)

    def close(self) -> None:
        """Removes the table."""
        self._clear()

    def _clear(self) -> None:
        if self._rows:
            print(f"\033[{self._rows}A\033[J", end="")
            self._rows = 0
