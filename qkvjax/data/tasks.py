"""Synthetic tasks: `synthetic:NAME` or `synthetic:NAME:KNOB=NUMBER:...`.

Five of the paper (Kayyam et al. 2026, section 4.1) on digits: copy, reverse, sort (ascending),
sub (9 - x) and swap (of the halves). Three of retrieval, which a causal model can learn as well:

- recall (Arora et al. 2024): `pairs` of a key and a value, then filler that contains `queries` of
  the keys again. The label of a query is its value.
- khop: the same with one alphabet, whose pairs form a cycle. The label of a query is the symbol
  `hops` steps further along the cycle.
- induction (Dao et al. 2023): random symbols with a trigger somewhere and at the end. The label of
  the last symbol is the symbol that followed the first trigger.

Every task also has the knobs `train` and `test`, the numbers of examples.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import numpy as np

from qkvjax.data.examples import Examples, Labelled
from qkvjax.errors import UserError, among

DIGITS = 10
# Inputs and targets, int32 [n, T], and weights [n, T] of the labels; None: all count.
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Task:
    """A synthetic task: how its examples are drawn, and what they need of a model.

    Attributes:
      draw: (random generator, number of examples, T, knobs) -> inputs, targets and weights.
      knobs: name -> default.
      num_symbols: number of input symbols, from the knobs.
      causal: whether each label follows from its symbol and earlier ones.
    """

    draw: Callable[[np.random.Generator, int, int, dict], Arrays]
    knobs: dict[str, int] = dataclasses.field(default_factory=dict)
    num_symbols: Callable[[dict], int] = lambda knobs: DIGITS
    causal: bool = False


def open_task(source: str, seq_len: int) -> Examples:
    """Returns the examples of `synthetic:NAME...`, which depend on `source` and T alone.

    Raises:
      UserError: an unknown task or knob, or a sequence that is too short for it.
    """
    _, name, *settings = source.split(":")
    if name not in TASKS:
        raise UserError(f"data.source={source!r}: the tasks are {among(name, TASKS)}")
    task = TASKS[name]
    knobs = _read_knobs(source, name, settings)
    rng = np.random.default_rng([zlib.crc32(source.encode()), seq_len])
    train = Labelled(*task.draw(rng, knobs["train"], seq_len, knobs))
    test = Labelled(*task.draw(rng, knobs["test"], seq_len, knobs))
    num_symbols = task.num_symbols(knobs)
    return Examples(
        source,
        train,
        test,
        seq_len,
        num_inputs=num_symbols,
        num_outputs=num_symbols,
        output="tokens",
        causal=task.causal,
    )


def _read_knobs(source: str, name: str, settings: list[str]) -> dict[str, int]:
    """Returns knob -> number, defaults included.

    Raises:
      UserError: an unknown knob, or numbers that do not fit each other.
    """
    knobs = {"train": 10_000, "test": 2_000} | TASKS[name].knobs
    for setting in settings:
        knob, _, number = setting.partition("=")
        if knob not in knobs or not number.isdecimal() or not 1 <= int(number) < 2**31:
            raise UserError(
                f"data.source={source!r}: {setting!r} is not a setting of {name}; write KNOB=NUMBER"
                f" with one of {among(knob, knobs)}"
            )
        knobs[knob] = int(number)
    _require_at_least(source, knobs, "symbols", than="pairs", extra=0)  # the keys differ
    _require_at_least(source, knobs, "pairs", than="hops", extra=1)  # a cycle is longer than a walk
    return knobs


def _require_at_least(source: str, knobs: dict[str, int], many: str, than: str, extra: int) -> None:
    """Raises UserError unless knobs[many] >= knobs[than] + extra, if the task has both."""
    if many not in knobs or than not in knobs:
        return
    minimum = knobs[than] + extra
    if knobs[many] < minimum:
        raise UserError(
            f"data.source={source!r}: {knobs[than]} {than} need {minimum} {many}, and there are"
            f" {knobs[many]}: raise {many}"
        )


def _digits_task(label: Callable[[np.ndarray], np.ndarray], causal: bool = False) -> Task:
    """Returns a task on random digits; `label` maps inputs [n, T] to targets [n, T]."""

    def draw(rng, count, length, knobs):
        digits = rng.integers(0, DIGITS, (count, length), np.int32)
        return digits, label(digits), None

    return Task(draw, causal=causal)


def _draw_distinct(rng: np.random.Generator, count: int, high: int, num: int) -> np.ndarray:
    """Returns int32 [count, num]: in each row, distinct numbers below `high` in random order."""
    return rng.permuted(np.tile(np.arange(high, dtype=np.int32), (count, 1)), axis=1)[:, :num]


def _pairs_then_queries(
    rng: np.random.Generator,
    length: int,
    knobs: dict,
    pairs: np.ndarray,
    answers: np.ndarray,
    filler: int,
) -> Arrays:
    """Returns rows of pairs, then filler with queries.

    A query is the first symbol of a pair; its label is the answer of that pair.

    Args:
      pairs: [n, P, 2].
      answers: [n, P].
      filler: a symbol.
    """
    count, num_pairs, _ = pairs.shape
    num_queries = knobs["queries"]
    room = length - 2 * num_pairs
    if room < num_queries:
        raise UserError(
            f"{num_pairs} pairs and {num_queries} queries take {2 * num_pairs + num_queries} tokens"
            f" and data.seq_len is {length}: raise it, or use fewer of them"
        )
    inputs = np.full((count, length), filler, np.int32)
    inputs[:, : 2 * num_pairs] = pairs.reshape(count, -1)
    targets = np.zeros_like(inputs)
    weights = np.zeros(inputs.shape, np.float32)
    positions = 2 * num_pairs + _draw_distinct(rng, count, room, num_queries)
    queried = rng.integers(0, num_pairs, (count, num_queries))
    keys = np.take_along_axis(pairs[:, :, 0], queried, axis=1)
    labels = np.take_along_axis(answers, queried, axis=1)
    np.put_along_axis(inputs, positions, keys, axis=1)
    np.put_along_axis(targets, positions, labels, axis=1)
    np.put_along_axis(weights, positions, 1.0, axis=1)
    return inputs, targets, weights


def _draw_recall(rng: np.random.Generator, count: int, length: int, knobs: dict) -> Arrays:
    num_symbols = knobs["symbols"]  # keys are smaller, values are not
    keys = _draw_distinct(rng, count, num_symbols, knobs["pairs"])
    values = rng.integers(num_symbols, 2 * num_symbols, keys.shape, np.int32)
    pairs = np.stack([keys, values], axis=-1)
    return _pairs_then_queries(rng, length, knobs, pairs, values, filler=2 * num_symbols)


def _draw_khop(rng: np.random.Generator, count: int, length: int, knobs: dict) -> Arrays:
    num_symbols = knobs["symbols"]
    num_pairs = knobs["pairs"]
    cycle = _draw_distinct(rng, count, num_symbols, num_pairs)
    order = _draw_distinct(rng, count, num_pairs, num_pairs)  # of the pairs in the input

    def after(steps: int) -> np.ndarray:
        """Returns, for each pair of the input, the symbol `steps` after its first one."""
        return np.take_along_axis(np.roll(cycle, -steps, axis=1), order, axis=1)

    pairs = np.stack([after(0), after(1)], axis=-1)
    answers = after(knobs["hops"])
    return _pairs_then_queries(rng, length, knobs, pairs, answers, filler=num_symbols)


def _draw_induction(rng: np.random.Generator, count: int, length: int, knobs: dict) -> Arrays:
    if length < 3:
        raise UserError(f"data.seq_len={length} must be at least 3 for synthetic:induction")
    trigger = knobs["symbols"]
    inputs = rng.integers(0, trigger, (count, length), np.int32)
    rows = np.arange(count)
    first = rng.integers(0, length - 2, count)
    inputs[rows, first] = trigger
    inputs[:, -1] = trigger
    targets = np.zeros_like(inputs)
    targets[:, -1] = inputs[rows, first + 1]
    weights = np.zeros(inputs.shape, np.float32)
    weights[:, -1] = 1
    return inputs, targets, weights


_PAIRS = {"pairs": 8, "queries": 4, "symbols": 16}
TASKS = {
    "copy": _digits_task(lambda x: x, causal=True),
    "reverse": _digits_task(lambda x: x[:, ::-1]),
    "sort": _digits_task(lambda x: np.sort(x, axis=1)),
    "sub": _digits_task(lambda x: 9 - x, causal=True),
    "swap": _digits_task(lambda x: np.roll(x, -(x.shape[1] // 2), axis=1)),
    "recall": Task(
        _draw_recall,
        knobs=_PAIRS,
        num_symbols=lambda knobs: 2 * knobs["symbols"] + 1,
        causal=True,
    ),
    "khop": Task(
        _draw_khop,
        knobs=_PAIRS | {"hops": 2},
        num_symbols=lambda knobs: knobs["symbols"] + 1,
        causal=True,
    ),
    "induction": Task(
        _draw_induction,
        knobs={"symbols": 16},
        num_symbols=lambda knobs: knobs["symbols"] + 1,
        causal=True,
    ),
}
