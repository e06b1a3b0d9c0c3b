"""The training loop: steps, a log line now and then, evaluations, checkpoints."""

from __future__ import annotations

import collections
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax

from qkvjax.parallel import host
from qkvjax.parallel.distributed import Loudest, is_first
from qkvjax.training.checkpoint import Checkpoints
from qkvjax.training.guard import IN_A_ROW, Rollback
from qkvjax.training.metrics import Metrics
from qkvjax.training.run import Run
from qkvjax.training.signals import SAVE, TIME_IS_UP, Stopped

Evaluator = Callable[[object], Mapping[str, float]]
# Steps that the host may be ahead of the device. It keeps the device busy, and yet a signal, a
# limit of time and the watchdog see within a few steps what goes on.
AHEAD = 4


def prefetch(make: Callable[[int], dict], start: int, stop: int) -> Iterator[dict]:
    """make(start), ..., make(stop - 1), each computed by a thread while the last is in use."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, start) if start < stop else None
        for step in range(start, stop):
            batch = ahead.result()
            if step + 1 < stop:
                ahead = pool.submit(make, step + 1)
            yield batch


class Clock:
    """Seconds of training alone: evaluation, saving and logging pause it."""

    def __init__(self, spent: float = 0.0):
        self.spent = spent
        self._since = time.perf_counter()

    def pause(self) -> None:
        self.spent += time.perf_counter() - self._since

    def go(self) -> None:
        self._since = time.perf_counter()


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


def due(step: int, every: int, last: int) -> bool:
    """Whether something done each `every` steps (0: never) is due after `step` of `last`."""
    return step == last or bool(every) and step % every == 0


def fit(
    run: Run, state, train_step: Callable, *, make_batch: Callable[[int], dict],
    evaluators: Mapping[str, Evaluator], checkpoints: Checkpoints, metrics: Metrics | None,
    seconds: float, requests: Callable[[], int], alive: Callable[[], None],
    check: Callable[[object], None], log: Callable[[str], None],
):  # fmt: skip
    """Trains from `state.step` to the run's last step.

    Args:
      train_step: compiled (leaves of a state, batch) -> (leaves, metrics).
      make_batch: step -> arrays on the mesh, for any step; called by a thread.
      metrics: None on processes that write none.
      seconds: training seconds that earlier parts of the run took.
      requests: asked after each step, see `training.signals`; an exit code means to save and raise
        Stopped. What one process of a job is asked, all do after the same step.
      alive: called after each step, evaluation and save.
      check: called with each state before it is saved; raises Rollback where it is not sound.
      evaluators: name -> (state -> metrics), each written as "name/metric".

    Raises:
      Rollback: too many bad steps in a row, or `check` did; nothing is saved then.
      Stopped: it was asked for before the last step; the state is saved.

    Returns:
      (state, summary): the summary has step, seconds, what evaluations took, the longest that a
      save held up training, and the last evaluation's metrics.
    """
    start, spent, longest_save = int(state.step), collections.Counter(), 0.0
    durations, max_seconds = run.durations, run.config.train.max_seconds
    steps = durations.steps
    peak_flops = host.peak_flops(run.mesh.size)
    leaves, tree = jax.tree.flatten(state)
    clock, began, window = Clock(seconds), time.perf_counter(), Window()
    summary: dict[str, float] = {}
    since_step, since_seconds = start, seconds
    bar, log = _progress_bar(start, steps, log)
    loudest = Loudest(run.mesh)

    step = start
    for batch in prefetch(make_batch, start, steps):
        leaves, values = train_step(leaves, batch)
        step += 1
        window.add(values)
        alive()
        late = max_seconds is not None and time.perf_counter() - began >= max_seconds
        asked = loudest(max(requests(), TIME_IS_UP if late else 0))
        out_of_time, code = asked == TIME_IS_UP, asked if asked > TIME_IS_UP else 0
        last = step if out_of_time or code else steps
        bar(step)
        # Who asks to stop does not wait for an evaluation.
        wants_eval = bool(evaluators) and due(step, durations.eval_every, steps if code else last)
        wants_save = asked == SAVE or due(step, durations.checkpoint_every, last)
        # A save closes the window of means, so that a resumed run writes the same lines.
        wants_log = wants_save or due(step, durations.log_every, last)
        if step == start + 1 and not wants_log:
            # The first step touches everything once; it would spoil the first line's speed.
            jax.block_until_ready(leaves)
            clock.pause()
            since_step, since_seconds = step, clock.spent
            clock.go()
        if not (wants_log or wants_eval):
            continue

        state = jax.tree.unflatten(tree, jax.block_until_ready(leaves))
        clock.pause()
        line: dict[str, float] = {"seconds": clock.spent, "tokens": step * run.tokens_per_step}
        if wants_log:
            line |= window.mean()
            if window.most_in_a_row >= min(IN_A_ROW, max(1, steps // 2)):
                bar(None)
                raise Rollback(step, f"{window.most_in_a_row} bad steps in a row", skip=True)
            # Within bad steps it would be where a rollback goes to.
            wants_save &= not window.in_a_row or asked > 0 or step == last
            passed = max(clock.spent - since_seconds, 1e-9)
            speed = (step - since_step) * run.tokens_per_step / passed if step > since_step else 0.0
            since_step, since_seconds = step, clock.spent
            line["tokens_per_second"] = speed
            if peak_flops:
                line["mfu"] = speed * run.train_flops_per_token / peak_flops
        evaluating = time.perf_counter()
        if wants_eval:
            for name, evaluate in evaluators.items():
                scores = {f"{name}/{k}": v for k, v in evaluate(state).items()}
                line |= scores
                summary |= scores
                alive()
        spent["evaluation_seconds"] += time.perf_counter() - evaluating
        if metrics is not None:
            metrics.write(step, line)
        if wants_log or wants_eval:
            pace = max(line.get("tokens_per_second", 0), 1e-9)
            left = (steps - step) * run.tokens_per_step / pace
            log(_log_line(step, steps, line, left if wants_log and not out_of_time else None))
        if wants_save:
            check(state)
            saving = time.perf_counter()
            checkpoints.save(step, state)
            longest_save = max(longest_save, time.perf_counter() - saving)
        alive()
        clock.go()
        if code and step < steps:
            bar(None)
            checkpoints.wait()
            told = f"saved after step {step} of {steps}: the same command goes on from there"
            raise Stopped(told, code)
        if out_of_time and step < steps:
            log(f"stopped after {max_seconds:g} s, as train.max_seconds says")
            break
    bar(None)
    checkpoints.wait()
    state = jax.tree.unflatten(tree, leaves)
    summary |= {"step": step, "seconds": clock.spent, "longest_save": longest_save}
    return state, summary | spent


def _log_line(step: int, steps: int, line: Mapping[str, float], left: float | None) -> str:
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    if "tokens_per_second" in line:
        mfu = f"{100 * line['mfu']:.1f} %" if "mfu" in line else "n/a"
        parts += [
            f"loss {line.get('train/loss', math.nan):.4f}",
            f"lr {line['train/learning_rate']:.2e}",
            f"{line['tokens_per_second']:,.0f} tokens/s",
            f"MFU {mfu}",
        ]
    parts += [
        f"{name} {value:.4f}"
        for name, value in line.items()
        if name.endswith(("/bits_per_byte", "/accuracy", "/loss")) and not name.startswith("train/")
    ]
    if line.get("train/bad_steps"):
        parts.append(f"{line['train/bad_steps']} bad steps left out")
    if left is not None and step < steps:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for people: "48 s", "3 min 20 s", "2 h 05 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _progress_bar(start: int, steps: int, log: Callable[[str], None]):
    """(move, log): `move(step)` sets the bar and `move(None)` ends it; `log` prints above it.

    Without a terminal on stderr there is no bar, and only process 0 has one.
    """
    if not (sys.stderr.isatty() and is_first()):
        return lambda step: None, log
    from tqdm import tqdm

    bar = tqdm(total=steps, initial=start, unit="step", leave=False, dynamic_ncols=True)
    return lambda step: bar.close() if step is None else bar.update(step - bar.n), bar.write
