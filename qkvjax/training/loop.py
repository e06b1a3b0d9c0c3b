"""The training loop: steps, a log line now and then, evaluations, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax

from qkvjax.data.ahead import ahead
from qkvjax.parallel import host
from qkvjax.parallel.distributed import MaxOverProcesses, several
from qkvjax.training.checkpoint import Checkpoints
from qkvjax.training.guard import IN_A_ROW, Rollback
from qkvjax.training.log_line import log_line, make_progress_bar
from qkvjax.training.metrics import Metrics
from qkvjax.training.run import Run
from qkvjax.training.signals import SAVE, TIME_IS_UP, Stopped
from qkvjax.training.window import Clock, Speed, Window


class Due(NamedTuple):
    """What is done after a step."""

    log: bool
    save: bool
    evaluation: bool


def due(step: int, every: int, last: int) -> bool:
    """Whether something done each `every` steps (0: never) is due after `step` of `last`."""
    return step == last or bool(every) and step % every == 0


class Interrupted(Exception):
    """An evaluation ends early: `request` is an exit code, or TIME_IS_UP."""

    def __init__(self, request: int):
        super().__init__(request)
        self.request = request


class Profile(NamedTuple):
    """Steps first, first + 1, ..., stop - 1 leave a trace in `folder`, for xprof."""

    first: int
    stop: int
    folder: str


class Loop:
    """Trains from a state to the run's last step.

    After each step: what is due is decided, the line of metrics is written, the state is saved, and
    then it is evaluated, so that an evaluation can fail or be stopped without loss.

    Args:
      run: the run.
      state: the train state to begin with; its arrays are donated.
      train_step: compiled (leaves of a state, batch) -> (leaves, metrics).
      make_batch: step -> arrays on the mesh, for any step; called by a thread.
      evaluators: name -> (state, pulse, log -> metrics), each written as "name/metric".
      checkpoints: where states are saved.
      metrics: None on processes that write none.
      earlier: the lines of metrics up to the state's step.
      requests: asked after each step and each batch of an evaluation, see `training.signals`. An
        exit code means to save and raise Stopped. What one process of a job is asked, all do after
        the same step.
      alive: called after each step, batch of an evaluation, and save.
      check: called with each state before it is saved; raises Rollback where it is not sound.
      profile: steps to trace, or None.
      log: gets every line.
    """

    def __init__(
        self,
        run: Run,
        state,
        train_step: Callable,
        *,
        make_batch: Callable[[int], dict],
        evaluators: Mapping[str, Callable],
        checkpoints: Checkpoints,
        metrics: Metrics | None,
        earlier: Sequence[Mapping],
        requests: Callable[[], int],
        alive: Callable[[], None],
        check: Callable[[object], None],
        log: Callable[[str], None],
        profile: Profile | None = None,
    ):
        self.run = run
        self.train_step = train_step
        self.make_batch = make_batch
        self.evaluators = evaluators
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.alive = alive
        self.check = check
        self.earlier = list(earlier)
        self.best, best_step = best_of(earlier)
        if run.config.train.keep_best:
            checkpoints.kept.best = best_step
        self.profile = profile
        self.leaves, self.tree = jax.tree.flatten(state)
        self.step = int(state.step)
        self.steps = run.durations.steps
        self.saved = self.step if self.step in checkpoints.steps() else None
        seconds = self.earlier[-1]["seconds"] if self.earlier else 0.0
        self.clock = Clock(seconds)
        self.window = Window()
        self.speed = Speed(self.step, seconds)
        self.summary: dict[str, float] = {}
        self.evaluation_seconds = 0.0
        self.longest_save = 0.0
        self.interrupted = False
        self.progress_bar, self.log = make_progress_bar(self.step, self.steps, log)
        self._requests = requests
        self._max_over_processes = MaxOverProcesses(run.mesh)
        self._began = time.perf_counter()

    def fit(self) -> tuple[object, dict[str, float]]:
        """Trains.

        Raises:
          Rollback: too many bad steps in a row, or `check` did; nothing is saved then.
          Stopped: it was asked for before the last step; the state is saved.

        Returns:
          (state, summary): the summary has step, seconds, what evaluations took, the longest that
          a save held up training, and the last evaluation's metrics.
        """
        start = self.step
        if is_unscored(self.earlier, start, self.run, self.evaluators):
            if not self._catch_up():
                return self._finish()
        batches = (self.make_batch(step) for step in range(start, self.steps))
        for batch in ahead(batches):
            self._train(batch)
            request = self.request()
            due_now = self._what_is_due(request)
            if self.step == start + 1 and not due_now.log:
                self._leave_out_first_step()
            if due_now.log or due_now.evaluation:
                request = self._pause(due_now, request)
            if request >= TIME_IS_UP and (self.step < self.steps or self.interrupted):
                self._stop(request)
                break
        return self._finish()

    def _finish(self) -> tuple[object, dict[str, float]]:
        """Waits for the last save; returns the state and the summary, as `fit`."""
        self.progress_bar(None)
        self.checkpoints.wait()
        return self.state, self.summary | {
            "step": self.step,
            "seconds": self.clock.spent,
            "longest_save": self.longest_save,
            "evaluation_seconds": self.evaluation_seconds,
        }

    @property
    def state(self):
        """The train state after the last step."""
        return jax.tree.unflatten(self.tree, self.leaves)

    def request(self) -> int:
        """What signals and the time limit ask for now, the same on every process of a job."""
        limit = self.run.config.train.max_seconds
        late = limit is not None and time.perf_counter() - self._began >= limit
        return self._max_over_processes(max(self._requests(), TIME_IS_UP if late else 0))

    # ---- one step ---------------------------------------------------------------------------

    def _train(self, batch) -> None:
        if self.profile and self.step == self.profile.first - 1:
            jax.block_until_ready(self.leaves)
            jax.profiler.start_trace(self.profile.folder)
        self.leaves, values = self.train_step(self.leaves, batch)
        self.step += 1
        self.window.add(values)
        self.alive()
        self.progress_bar(self.step)
        if self.profile and self.step == min(self.profile.stop - 1, self.steps):
            jax.block_until_ready(self.leaves)
            jax.profiler.stop_trace()
            self.log(
                f"the trace of steps {self.profile.first} to {self.step} is in"
                f" {self.profile.folder}"
            )

    def _what_is_due(self, request: int) -> Due:
        durations = self.run.durations
        stops = request >= TIME_IS_UP
        last = self.step if stops else self.steps
        keeps = bool(durations.keep_every) and self.step % durations.keep_every == 0
        save = request == SAVE or keeps or due(self.step, durations.checkpoint_every, last)
        # A save closes the window of means, so that a resumed run writes the same lines.
        log = save or due(self.step, durations.log_every, last)
        # Who asks to stop does not wait for an evaluation; the next start makes up for it.
        evaluation = bool(self.evaluators) and due(self.step, durations.eval_every, self.steps)
        return Due(log, save, evaluation and (not stops or self.step == self.steps))

    def _catch_up(self) -> bool:
        """Evaluates the state that the run begins with, which was due when it was saved.

        Returns:
          False where the time limit ended the evaluation: no step is left to train now.
        """
        self.clock.pause()
        line = dict(self.earlier[-1]) if self.earlier else {}
        try:
            line |= self.evaluate()
        except Interrupted as interrupted:
            self._stop(interrupted.request)
            return False
        self.log(log_line(self.step, self.steps, line, None))
        self.clock.go()
        return True

    def _leave_out_first_step(self) -> None:
        """The first step touches everything once; it would spoil the first line's speed."""
        jax.block_until_ready(self.leaves)
        self.clock.pause()
        self.speed.begin(self.step, self.clock.spent)
        self.clock.go()

    def _pause(self, due_now: Due, request: int) -> int:
        """Writes, saves and evaluates what is due; returns the request, or a later one."""
        jax.block_until_ready(self.leaves)
        self.clock.pause()
        line = self._line(due_now)
        asked = request > 0 or self.step == self.steps
        if self.metrics is not None:
            self.metrics.write(self.step, line)
        # Do not save during a run of bad steps: a rollback would return to them.
        if due_now.save and (asked or not self.window.in_a_row):
            self.save()
        if due_now.evaluation:
            try:
                line |= self.evaluate()
            except Interrupted as interrupted:
                self.interrupted = True
                request = interrupted.request
                self.save()
        left = None
        if due_now.log and request < TIME_IS_UP:
            tokens = (self.steps - self.step) * self.run.tokens_per_step
            left = tokens / max(line["tokens_per_second"], 1e-9)
        self.log(log_line(self.step, self.steps, line, left))
        self.alive()
        self.clock.go()
        return request

    def _line(self, due_now: Due) -> dict[str, float]:
        """The line of metrics of this step, without scores."""
        tokens_per_step = self.run.tokens_per_step
        line = {"seconds": self.clock.spent, "tokens": self.step * tokens_per_step}
        if not due_now.log:
            return line
        line |= self.window.mean()
        bad_steps = self.window.most_in_a_row
        if bad_steps >= min(IN_A_ROW, max(1, self.steps // 2)):
            self.progress_bar(None)
            raise Rollback(self.step, f"{bad_steps} bad steps in a row", skip=True)
        speed = tokens_per_step * self.speed.steps_per_second(self.step, self.clock.spent)
        line["tokens_per_second"] = speed
        if peak_flops := host.peak_flops(self.run.mesh.size):
            line["mfu"] = speed * self.run.train_flops_per_token / peak_flops
        return line

    # ---- saving and scoring -----------------------------------------------------------------

    def save(self) -> None:
        """Saves the state of this step, unless it is saved."""
        if self.saved == self.step:
            return
        state = self.state
        self.check(state)
        began = time.perf_counter()
        self.checkpoints.save(self.step, state)
        self.longest_save = max(self.longest_save, time.perf_counter() - began)
        self.saved = self.step

    def evaluate(self) -> dict[str, float]:
        """The scores of this step's state, which also join its line of metrics.

        Raises:
          Interrupted: a signal or the time limit asks for the run's end.
        """
        began = time.perf_counter()
        scores: dict[str, float] = {}
        try:
            for name, evaluator in self.evaluators.items():
                values = evaluator(self.state, self._pulse, self.log)
                scores |= {f"{name}/{key}": value for key, value in values.items()}
                self.alive()
        except Interrupted:
            raise
        except BaseException:
            if not several():  # saving is for all processes of a job, and this one alone failed
                self.save()
                self.checkpoints.wait()
                self.log(f"the evaluation of step {self.step} failed; its state is saved")
            raise
        finally:
            self.evaluation_seconds += time.perf_counter() - began
        self.summary |= scores
        if self.metrics is not None:
            self.metrics.amend(self.step, scores)
        self._note_best(scores)
        return scores

    def _pulse(self) -> None:
        """Obeys signals and the time limit between two batches of an evaluation."""
        self.alive()
        request = self.request()
        if request == SAVE:
            self.save()
        elif request > TIME_IS_UP or (request and self.step < self.steps):
            raise Interrupted(request)

    def _note_best(self, scores: Mapping[str, float]) -> None:
        loss = loss_of(scores)
        if loss is None or (self.best is not None and loss >= self.best):
            return
        self.best = loss
        if self.run.config.train.keep_best:
            self.save()
            self.checkpoints.kept.best = self.step

    def _stop(self, request: int) -> None:
        """Ends the run before its last step; what is due is written and saved."""
        if request > TIME_IS_UP:
            self.progress_bar(None)
            self.checkpoints.wait()
            raise Stopped(
                f"saved after step {self.step} of {self.steps}: the same command goes on from"
                " there",
                request,
            )
        limit = self.run.config.train.max_seconds
        self.log(f"stopped after {limit:g} s, as train.max_seconds says")


def is_unscored(lines: Sequence[Mapping], step: int, run: Run, evaluators: Mapping) -> bool:
    """Whether the evaluation that was due after `step` is missing from the lines of metrics."""
    if not evaluators or not step or not due(step, run.durations.eval_every, run.durations.steps):
        return False
    written = {key.partition("/")[0] for line in lines if line["step"] == step for key in line}
    return not written.issuperset(evaluators)


def loss_of(scores: Mapping[str, float]) -> float | None:
    """What "best" is decided by, smaller being better: the first bits per byte or, of labelled
    examples, error rate among the scores; None where there is neither."""
    names = (name for name in scores if name.endswith(("/bits_per_byte", "/error")))
    return scores.get(next(names, ""))


def best_of(lines: Sequence[Mapping]) -> tuple[float | None, int | None]:
    """(the smallest of `loss_of` among lines of metrics, its step), or None twice."""
    scored = [(loss_of(line), line["step"]) for line in lines if loss_of(line) is not None]
    return min(scored, default=(None, None))
