"""Tunes one field for each variant: reads `study.tuned` and chooses the best value.

A tuned study has two phases. The first ("tune") trains every point in every setting with every
value of the field. The second ("compare") trains every point in every setting with its best value.
The phases use different seeds. If the runs that chose the value were also compared, the result
would favour the variant whose best run was luckiest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from qkvjax import sweep
from qkvjax.errors import UserError

TUNE = "tune"
COMPARE = "compare"
# First tuning seed minus first compared seed, if a study gives only the number of tuning seeds.
SEED_DISTANCE = 100
_REMEDY = "make it with qkvjax.sweep.tuned(field, values, seeds)"


class Tuning(NamedTuple):
    """The field that a study tunes.

    Attributes:
      field: field of the configuration, such as "optimizer.learning_rate".
      values: the values to try.
      seeds: seeds of the tuning runs.
    """

    field: str
    values: list
    seeds: list[int]

    def best(self, scores: Mapping[object, Sequence[float]]) -> object:
        """Returns the value with the lowest mean score; the first of several equal ones.

        Args:
          scores: value -> the score of each seed.
        """
        return min(self.values, key=lambda value: sum(scores[value]) / len(scores[value]))

    def remark(self, label: str, setting: str, value: object) -> str | None:
        """Returns a sentence if the best value is the smallest or largest that was tried.

        A value outside the tried range may then be better. Returns None for other values, for
        texts, and for 0: there is no smaller dropout or weight decay.
        """
        if not all(_is_number(other) for other in self.values) or value == 0:
            return None
        edges = {
            min(self.values): "the smallest that was tried: try smaller ones",
            max(self.values): "the largest that was tried: try larger ones",
        }
        if value not in edges:
            return None
        where = f" in {setting}" if setting else ""
        return f"the best {sweep.last_part(self.field)} of {label}{where} is {edges[value]}"


def read_tuning(options: object, compared: list[int], points: Iterable[dict]) -> Tuning | None:
    """Returns the group `study.tuned` of a config, checked; None if the study tunes nothing.

    Args:
      options: the group as plain values.
      compared: the seeds of the runs that are compared.
      points: the points and settings of the grid.

    Raises:
      UserError: the group is not one that `sweep.tuned` makes, the field is in the grid too, or a
        seed is in both phases.
    """
    if options in (None, {}):
        return None
    if not isinstance(options, dict) or options.keys() != {"field", "values", "seeds"}:
        raise UserError(f"study.tuned={options!r} is not a tuning: {_REMEDY}, or leave it empty")
    field = options["field"]
    if not isinstance(field, str):
        raise UserError(f"study.tuned.field={field!r} is not a field: {_REMEDY}")
    if any(field in point for point in points):
        raise UserError(
            f"{field} is set in the grid and in study.tuned: remove it from one of them"
        )
    tuning = Tuning(field, _values(options["values"]), _seeds(options["seeds"], compared))
    both = sorted(set(tuning.seeds) & set(compared))
    if both:
        raise UserError(
            f"seed {both[0]} tunes and is compared (study.tuned.seeds={options['seeds']!r}; the"
            f" compared seeds are {compared[0]} to {compared[-1]}): list other seeds, or set"
            " study.tuned.seeds to a number, and other seeds are chosen"
        )
    return tuning


def _values(values: object) -> list:
    """Returns `study.tuned.values`, or raises UserError."""
    if not isinstance(values, list) or len(values) < 2:
        raise UserError(f"study.tuned.values={values!r}: give at least two values to choose from")
    if any(not isinstance(value, (int, float, str)) for value in values):
        raise UserError(f"study.tuned.values={values!r}: only numbers and texts can be tuned")
    if len(set(values)) < len(values):
        raise UserError(f"study.tuned.values={values!r} has a value twice: remove one")
    return values


def _seeds(seeds: object, compared: list[int]) -> list[int]:
    """Returns the tuning seeds that `study.tuned.seeds` lists or counts, or raises UserError."""
    if isinstance(seeds, int) and seeds >= 1:
        return [compared[0] + SEED_DISTANCE + i for i in range(seeds)]
    is_list = isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)
    if not is_list or len(set(seeds)) < len(seeds):
        raise UserError(
            f"study.tuned.seeds={seeds!r}: give a number of at least 1, or a list of different"
            " seeds"
        )
    return seeds


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
