"""Synthetic tasks: `synthetic:NAME` or `synthetic:NAME:KNOB=NUMBER:...`.

Five of the paper (Kayyam et al. 2026, section 4.1) on digits: copy, reverse, sort (ascending),
sub (9 - x) and swap (of the halves). Three of retrieval, which a causal model can do as well:

- recall (Arora et al. 2024): `pairs` of a key and a value, then filler among which `queries` of the
  keys stand again; the label of a query is its value.
- khop: the same with one alphabet, whose pairs form a cycle; the label is what `hops` steps
  along it lead to.
- induction (Dao et al. 2023): random symbols with a trigger somewhere and at the end; the label
  of the last is what followed the first.

Every task also has the knobs `train` and `test`, numbers of examples.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import numpy as np

from qkvjax.data.examples import Examples, Labelled
from qkvjax.errors import UserError, among

DIGITS = 10
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      draw: (generator, number of examples, T, knobs) -> inputs and targets [n, T], and which
        labels count.
      knobs: name -> default.
      num_symbols: of the inputs, from the knobs.
      causal: whether the past says what the labels are.
    """

    draw: Callable[[np.random.Generator, int, int, dict], Arrays]
    knobs: dict[str, int] = dataclasses.field(default_factory=dict)
    num_symbols: Callable[[dict], int] = lambda knobs: DIGITS
    causal: bool = False


def _on_digits(label: Callable[[np.ndarray], np.ndarray], causal: bool = False) -> Task:
    def draw(rng, count, length, knobs):
        digits = rng.integers(0, DIGITS, (count, length), np.int32)
        return digits, label(digits), None

    return Task(draw, causal=causal)


def _some(rng, count: int, of: int, take: int) -> np.ndarray:
    """`take` different numbers below `of` in random order, for each of `count` rows."""
    return rng.permuted(np.tile(np.arange(of, dtype=np.int32), (count, 1)), axis=1)[:, :take]


def _ask(rng, count: int, length: int, knobs: dict, pairs, answer, filler: int) -> Arrays:
    """Rows of pairs [n, P, 2], then filler with queries: the first of pair i asks for
    answer[:, i].
    """
    num_pairs, queries = knobs["pairs"], knobs["queries"]
    room = length - 2 * num_pairs
    if room < queries:
        raise UserError(
            f"{num_pairs} pairs and {queries} queries take {2 * num_pairs + queries} tokens and"
            f" data.seq_len is {length}: raise it, or ask for fewer"
        )
    inputs = np.full((count, length), filler, np.int32)
    inputs[:, : 2 * num_pairs] = pairs.reshape(count, -1)
    targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
    places = 2 * num_pairs + _some(rng, count, room, queries)
    asked = rng.integers(0, num_pairs, (count, queries))
    take = np.take_along_axis
    np.put_along_axis(inputs, places, take(pairs[:, :, 0], asked, 1), 1)
    np.put_along_axis(targets, places, take(answer, asked, 1), 1)
    np.put_along_axis(weights, places, 1.0, 1)
    return inputs, targets, weights


def _recall(rng, count, length, knobs):
    symbols, num_pairs = knobs["symbols"], knobs["pairs"]
    keys = _some(rng, count, symbols, num_pairs)
    values = rng.integers(symbols, 2 * symbols, keys.shape, np.int32)
    pairs = np.stack([keys, values], -1)
    return _ask(rng, count, length, knobs, pairs, values, 2 * symbols)


def _khop(rng, count, length, knobs):
    symbols, num_pairs = knobs["symbols"], knobs["pairs"]
    cycle = _some(rng, count, symbols, num_pairs)
    order = _some(rng, count, num_pairs, num_pairs)  # in which the steps of the cycle are told
    step = lambda n: np.take_along_axis(np.roll(cycle, -n, 1), order, 1)  # noqa: E731
    pairs = np.stack([step(0), step(1)], -1)
    return _ask(rng, count, length, knobs, pairs, step(knobs["hops"]), symbols)


def _induction(rng, count, length, knobs):
    if length < 3:
        raise UserError(f"data.seq_len={length} must be at least 3 for synthetic:induction")
    trigger = knobs["symbols"]
    inputs = rng.integers(0, trigger, (count, length), np.int32)
    row, first = np.arange(count), rng.integers(0, length - 2, count)
    inputs[row, first] = inputs[:, -1] = trigger
    targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
    targets[:, -1], weights[:, -1] = inputs[row, first + 1], 1
    return inputs, targets, weights


_PAIRS = {"pairs": 8, "queries": 4, "symbols": 16}
TASKS = {
    "copy": _on_digits(lambda x: x, causal=True),
    "reverse": _on_digits(lambda x: x[:, ::-1]),
    "sort": _on_digits(lambda x: np.sort(x, axis=1)),
    "sub": _on_digits(lambda x: 9 - x, causal=True),
    "swap": _on_digits(lambda x: np.roll(x, -(x.shape[1] // 2), axis=1)),
    "recall": Task(_recall, _PAIRS, lambda knobs: 2 * knobs["symbols"] + 1, True),
    "khop": Task(_khop, _PAIRS | {"hops": 2}, lambda knobs: knobs["symbols"] + 1, True),
    "induction": Task(_induction, {"symbols": 16}, lambda knobs: knobs["symbols"] + 1, True),
}


def open_task(source: str, seq_len: int) -> Examples:
    """The examples of `synthetic:NAME...`: always the same ones for the same text and T.

    Raises:
      UserError: an unknown task or knob, or a sequence that is too short for it.
    """
    _, name, *settings = source.split(":")
    if name not in TASKS:
        raise UserError(f"data.source={source!r}: the tasks are {among(name, TASKS)}")
    task = TASKS[name]
    knobs = {"train": 10_000, "test": 2_000} | task.knobs
    for setting in settings:
        knob, _, number = setting.partition("=")
        if knob not in knobs or not number.isdecimal() or not 1 <= int(number) < 2**31:
            raise UserError(
                f"data.source={source!r}: {setting!r} is no setting of {name}; write KNOB=NUMBER"
                f" with one of {among(knob, knobs)}"
            )
        knobs[knob] = int(number)
    for few, many, more in (("pairs", "symbols", 0), ("hops", "pairs", 1)):
        if (least := knobs.get(few, 0) + more) > knobs.get(many, least):
            raise UserError(
                f"data.source={source!r}: {knobs[few]} {few} need {least} {many}, and there are"
                f" {knobs[many]}: raise {many}"
            )
    rng = np.random.default_rng([zlib.crc32(source.encode()), seq_len])
    splits = [Labelled(*task.draw(rng, knobs[n], seq_len, knobs)) for n in ("train", "test")]
    symbols = task.num_symbols(knobs)
    return Examples(source, *splits, seq_len, symbols, symbols, "tokens", causal=task.causal)
