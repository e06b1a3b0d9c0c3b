"""What is measured between two lines of metrics: time, speed and means."""

from __future__ import annotations

import collections
import time

import jax

# Steps that the host may be ahead of the device. It keeps the device busy, and yet a signal, a
# limit of time and the watchdog see within a few steps what goes on.
AHEAD = 4


class Clock:
    """Seconds of training alone: evaluation, saving and logging pause it."""

    def __init__(self, spent: float = 0.0):
        self.spent = spent
        self._since = time.perf_counter()

    def pause(self) -> None:
        self.spent += time.perf_counter() - self._since

    def go(self) -> None:
        self._since = time.perf_counter()


class Speed:
    """Steps a second since the last line of metrics."""

    def __init__(self, step: int, seconds: float):
        self.begin(step, seconds)

    def begin(self, step: int, seconds: float) -> None:
        """Counts from here on."""
        self._step = step
        self._seconds = seconds

    def steps_per_second(self, step: int, seconds: float) -> float:
        """Since the last call, or `begin`; 0 where no step was done."""
        done = step - self._step
        passed = max(seconds - self._seconds, 1e-9)
        self.begin(step, seconds)
        return done / passed


class Window:
    """Means of the good steps since the last line. Values stay on the device, where nothing waits
    for them, until there are many or a mean is asked for.

    Attributes:
      in_a_row: bad steps up to the last that was fetched.
      most_in_a_row: of all that were fetched.
    """

    MANY = 1024

    def __init__(self):
        self._waiting: list[dict] = []
        self._sums, self._good, self._bad, self._rate = collections.Counter(), 0, 0, 0.0
        self.in_a_row = self.most_in_a_row = 0

    def add(self, values: dict[str, jax.Array]) -> None:
        """Takes note of a step's metrics, and waits for the step AHEAD before."""
        self._waiting.append(values)
        if len(self._waiting) > AHEAD:
            jax.block_until_ready(self._waiting[-1 - AHEAD])
        if len(self._waiting) == self.MANY:
            self._fetch()

    def _fetch(self) -> None:
        for record in jax.device_get(self._waiting):
            self._rate = float(record.pop("learning_rate"))
            if record.pop("bad"):
                self._bad += 1
                self.in_a_row += 1
                self.most_in_a_row = max(self.most_in_a_row, self.in_a_row)
                continue
            self.in_a_row = 0
            self._good += 1
            for name, value in record.items():
                self._sums[name] += float(value)
        self._waiting = []

    def mean(self) -> dict[str, float]:
        """Means of the metrics, the last learning rate and how many steps were bad; a new window
        begins."""
        self._fetch()
        mean = {f"train/{name}": total / self._good for name, total in self._sums.items()}
        counted = {"train/learning_rate": self._rate, "train/bad_steps": self._bad}
        self._sums, self._good, self._bad = collections.Counter(), 0, 0
        return mean | counted
