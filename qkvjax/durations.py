"""Durations: steps (300), epochs ("2ep"), tokens ("10M tokens") or a part of a run ("5%")."""

from __future__ import annotations

import re

from qkvjax.errors import UserError

Duration = int | str
MOST_STEPS = 2**31  # the train state counts steps in 32 bits
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def to_steps(
    value: Duration,
    name: str,
    *,
    tokens_per_step: int,
    steps_per_epoch: int,
    total: int | None = None,
) -> int:
    """Returns a duration in steps.

    Args:
      value: steps (an int, or its text), epochs ("2ep"), tokens ("10M tokens") or a part of
        the whole run ("5%").
      name: the field, for messages.
      tokens_per_step: tokens of a batch.
      steps_per_epoch: batches in one pass over the training records.
      total: steps of the whole run; None where "%" makes no sense.

    Returns:
      At least 1, or 0 where the value is 0.

    Raises:
      UserError: the value is not a duration, or too long.
    """
    text = str(value).strip().lower().replace("_", "")
    match = re.fullmatch(r"([0-9.]+)\s*([kmb]?)\s*(ep|epochs?|tokens?|steps?|%)?", text)
    remedy = f'{name}={value!r} is not a duration: write steps (300), "2ep", "10M tokens" or "5%"'
    if not match or value is None:
        raise UserError(remedy)
    try:
        number = float(match[1]) * _UNITS[match[2]]
    except ValueError:
        raise UserError(remedy) from None
    unit = match[3] or "steps"
    if unit == "%":
        if total is None:
            raise UserError(
                f"{name}={value!r}: a percentage of {name} cannot define {name}; give steps,"
                " epochs or tokens"
            )
        steps = number / 100 * total
    elif unit.startswith("ep"):
        steps = number * steps_per_epoch
    elif unit.startswith("token"):
        steps = number / tokens_per_step
    else:
        steps = number
    if steps >= MOST_STEPS:
        raise UserError(f"{name}={text[:20]!r} is {steps:.3g} steps: give fewer than 2^31")
    return max(1, round(steps)) if number else 0
