"""Bad steps: none reaches the weights or a mean, and many in a row end in a rollback.

A step is bad when its loss or gradient is no finite number, on any device, or, where
`optimizer.skip_spikes` asks for it, far above the last ones. It changes nothing but the count of
steps. After IN_A_ROW of them, or half of a shorter run, the run goes back to the newest intact
checkpoint and goes on with other data: those of the steps since then are left out. What happened is
kept in WORKDIR/rollbacks.jsonl: the data of a step stay a function of (seed, step, that file).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from qkvjax.errors import UserError
from qkvjax.parallel import host

DIVERGED = 44  # exit code
IN_A_ROW = 8  # bad steps
MOST_ROLLBACKS = 3
RECENT = 128  # good steps that a spike is held against
# What counts as noise however calm a run is: 1 % of the loss, 5 % of the gradient's norm.
CALM = (0.01, 0.05)


class Diverged(UserError):
    """Rollbacks did not help; every process raises it alike."""

    agreed = True

    def __init__(self, rollbacks: Iterable[Mapping]):
        account = "".join(f"\n  {told(line)}" for line in rollbacks)
        super().__init__(
            "training diverged: lower optimizer.learning_rate, or set optimizer.skip_spikes=10 (the"
            f" checkpoints that are there are intact):{account}",
            DIVERGED,
        )


class Rollback(Exception):
    """The state is not to be gone on with; every process raises it after the same step.

    Attributes:
      step: steps done.
      reason: what happened, for people.
      skip: whether the data of the steps since the checkpoint are to be left out.
    """

    agreed = True

    def __init__(self, step: int, reason: str, skip: bool):
        super().__init__(reason)
        self.step, self.reason, self.skip = step, reason, skip

    def line(self, to: int) -> dict:
        """For rollbacks.jsonl, once the state of step `to` is back."""
        skip = self.skip * (self.step - to)
        return {
            "step": self.step,
            "to": to,
            "skip": skip,
            "reason": self.reason,
            "date": host.now(),
        }


def told(line: Mapping) -> str:
    """A line of rollbacks.jsonl for people."""
    data = f", the data of {line['skip']} steps left out" if line["skip"] else ""
    return f"step {line['step']}, {line['reason']}: back to step {line['to']}{data}"


def data_step(step: int, rollbacks: Sequence[Mapping]) -> int:
    """The step whose data a step trains on: later than itself by what rollbacks left out."""
    for line in reversed(rollbacks):  # each counts in the steps of those before it
        step += line["skip"] if line["to"] <= step else 0
    return step


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Recent:
    """The last good steps.

    Attributes:
      values: float32 [2, RECENT], their losses and the logarithms of their gradients' norms.
      count: int32 scalar, good steps so far.
    """

    values: jax.Array
    count: jax.Array


def no_steps() -> Recent:
    """Before the first step."""
    return Recent(jnp.zeros((2, RECENT)), jnp.zeros((), jnp.int32))


def judge(
    recent: Recent | None, loss: jax.Array, norm: jax.Array, threshold: float | None
) -> tuple[jax.Array, Recent | None]:
    """(whether a step is good, the last good steps with this one if it is).

    Args:
      recent: None where spikes are not looked for.
      loss, norm: float32 scalars of the step, before clipping.
      threshold: a step is bad when one of the two is so many robust standard deviations (1.4826
        median absolute deviations, and no less than CALM) above the median of RECENT good steps;
        before there are so many none is.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if recent is None:
        return finite, None
    now = jnp.stack([loss, jnp.log(jnp.maximum(norm, 1e-30))]).astype(jnp.float32)
    middle = jnp.median(recent.values, axis=1)
    deviation = 1.4826 * jnp.median(jnp.abs(recent.values - middle[:, None]), axis=1)
    calm = jnp.stack([CALM[0] * jnp.abs(middle[0]), jnp.full((), CALM[1])])
    spike = jnp.any(now > middle + threshold * jnp.maximum(deviation, calm))
    good = finite & ~(spike & (recent.count >= RECENT))
    column = jnp.arange(RECENT) == recent.count % RECENT
    values = jnp.where(good & column, now[:, None], recent.values)
    return good, Recent(values, recent.count + good)
