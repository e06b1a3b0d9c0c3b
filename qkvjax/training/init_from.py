"""`train.init_from`: a run that starts from a checkpoint of another run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax

from qkvjax import config as configs
from qkvjax.errors import UserError
from qkvjax.training.checkpoint import Checkpoints
from qkvjax.training.optimizer import decay_steps
from qkvjax.training.run import Run
from qkvjax.training.step import new_state, state_shardings

# Differences in which a run still goes on with the other's optimizer and step.
MAY_DIFFER = ("train.steps", "train.init_from")


def parse(text: str) -> tuple[Path, int | None]:
    """(RUN, STEP) of "RUN@STEP"; None of "RUN", which means its newest intact checkpoint."""
    folder, at, step = text.rpartition("@")
    if not at or not step.isdecimal():
        return Path(text), None
    return Path(folder), int(step)


def start_from(run: Run, log: Callable[[str], None]):
    """The state that `train.init_from` names, for a run that has no checkpoint of its own.

    The other run's whole state, with optimizer and step, where the two configurations differ only
    in `train.steps`: one long run under the schedule wsd then ends several times, at several
    lengths. Else its weights alone, or their average where it keeps one, at step 0.

    Returns:
      (state, step).

    Raises:
      UserError: there is no such checkpoint, it holds another model, or it is not before the end
        of this run.
    """
    text = run.config.train.init_from
    folder, step = parse(text)
    if not folder.is_dir():
        raise UserError(f"train.init_from={text!r}: there is no workdir {folder}")
    other = configs.load(folder / "config.json")
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        differences = _differences(other, run.config)
        if not differences:
            state, done = checkpoints.restore(run.abstract, step, log=log)
            if done >= run.durations.steps:
                raise UserError(
                    f"train.init_from={text!r} has {done} steps and this run ends after"
                    f" {run.durations.steps}: raise train.steps or name an earlier one, as RUN@STEP"
                )
            log(f"starts from step {done} of {folder}, with its optimizer and data order")
            return state, done
        weights, done = _weights(checkpoints, run, other, step, log)
    tx = run.optimizer
    places = jax.tree.map(lambda leaf: leaf.sharding, run.abstract)
    make = jax.jit(lambda model: new_state(model, tx, run.config), out_shardings=places)
    log(
        f"starts from the weights of step {done} of {folder}, at step 0 with a new optimizer:"
        f" {', '.join(differences)} differ"
    )
    return make(weights), 0


def _differences(other, config) -> list[str]:
    """Names of the identity's fields in which two configurations differ."""
    old = configs.identity(other)
    new = configs.identity(config)
    names = sorted(old.keys() | new.keys())
    return [n for n in names if old.get(n) != new.get(n) and n not in MAY_DIFFER]


def _weights(checkpoints: Checkpoints, run: Run, other, step: int | None, log):
    """(the weights of another run on this run's mesh, their step)."""
    has_average = bool(other.optimizer.average)
    part = "average" if has_average else "model"
    dtype = "float32" if has_average else other.train.param_dtype
    shapes = jax.eval_shape(lambda: run.new_model(dtype))
    places = state_shardings(shapes, run.mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )
    restored, done = checkpoints.restore({part: abstract}, step, log=log)
    return restored[part], done


def growth_note(saved_config, config, done: int, to_steps: Callable[[object], int]) -> str | None:
    """A line for the log about a run under the schedule wsd that is lengthened after its learning
    rate began to fall; None otherwise.

    Args:
      saved_config: what the workdir was trained with.
      done: steps of its newest checkpoint.
      to_steps: from `train.steps` to steps.
    """
    before = to_steps(saved_config.train.steps)
    grows = to_steps(config.train.steps) > before
    begin = before - decay_steps(before)
    if config.optimizer.schedule != "wsd" or not grows or done <= begin:
        return None
    return (
        f"note: the learning rate of this run fell from step {begin} to {done} and rises again now."
        " To lengthen a run without that, start from a checkpoint before the fall in another"
        f" workdir: --config.train.init_from=RUN@STEP with a STEP up to {begin} (train.keep_every"
        " keeps such checkpoints)"
    )
