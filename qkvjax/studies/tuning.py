"""Each variant at its own best value of a field: what is tried, and what is chosen.

A tuned study has two phases. The first ("tune") trains every point in every setting with every
value of the field, on seeds of its own. The second ("compare") trains every point in every setting
with its best value, on the seeds that are compared: a value that was chosen by the runs that are
then compared would flatter the variant that gained most from chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from qkvjax import sweep
from qkvjax.errors import UserError

TUNE = "tune"
COMPARE = "compare"
# Between the first seed that is compared and the first that tunes, where a study says how many.
SEED_DISTANCE = 100
_REMEDY = "make it with qkvjax.sweep.tuned(field, values, seeds)"


class Tuning(NamedTuple):
    """What a study tunes.

    Attributes:
      field: of the configuration, such as "optimizer.learning_rate".
      values: what is tried.
      seeds: of the tuning runs.
    """

    field: str
    values: list
    seeds: list[int]

    def best(self, scores: Mapping[object, Sequence[float]]) -> object:
        """Returns the value with the lowest mean score, of equals the first that was listed.

        Args:
          scores: value -> the scores of its seeds.
        """
        return min(self.values, key=lambda value: sum(scores[value]) / len(scores[value]))

    def remark(self, label: str, setting: str, value: object) -> str | None:
        """Returns a sentence about a best value at the edge of the values, where the next one could
        be better; None where it lies inside."""
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
    """Returns what `study.tuned` of a config says, checked; None where a study tunes nothing.

    Args:
      options: the group as plain values.
      compared: the seeds of the runs that are compared.
      points: the points and settings of the grid.

    Raises:
      UserError: it is not made as `sweep.tuned` makes it, or a seed would tune and be compared.
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
            f"{field} stands in the grid and in study.tuned: remove it from one of them"
        )
    tuning = Tuning(field, _values(options["values"]), _seeds(options["seeds"], compared))
    both = sorted(set(tuning.seeds) & set(compared))
    if both:
        raise UserError(
            f"seed {both[0]} tunes and is compared (study.tuned.seeds={options['seeds']!r}; the"
            f" compared seeds are {compared[0]} to {compared[-1]}): set study.tuned.seeds to a"
            " number, which takes others, or list other seeds"
        )
    return tuning


def _values(values: object) -> list:
    if not isinstance(values, list) or len(values) < 2:
        raise UserError(f"study.tuned.values={values!r}: give at least two values to choose from")
    if any(not isinstance(value, (int, float, str)) for value in values):
        raise UserError(f"study.tuned.values={values!r}: numbers and texts can be tuned")
    if len(set(values)) < len(values):
        raise UserError(f"study.tuned.values={values!r} has a value twice: remove one")
    return values


def _seeds(seeds: object, compared: list[int]) -> list[int]:
    if isinstance(seeds, int) and seeds >= 1:
        return [compared[0] + SEED_DISTANCE + i for i in range(seeds)]
    listed = isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)
    if not listed or len(set(seeds)) < len(seeds):
        raise UserError(
            f"study.tuned.seeds={seeds!r}: give a number of at least 1, or a list of different"
            " seeds"
        )
    return seeds


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
