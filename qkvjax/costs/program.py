"""What a compiled program does, read from its HLO text: matrix products and collectives.

The compiler counts the FLOPs in the body of a loop once; here the body counts as often as it runs.
Of a conditional only the first branch counts, the one for a false condition. In `parallel.experts`,
which has such conditionals, this is the usual branch and the other one is a fallback.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_FIRST_BRANCH = re.compile(r"(?:branch_computations=\{|false_computation=)%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')


class Instruction(NamedTuple):
    """A line of a computation, "%name = shape kind(operands), attributes".

    Attributes:
      name: of its result.
      shape: of its result, such as "f32[8,128]{1,0}", or a tuple of such.
      kind: such as "dot" or "while".
      rest: the text after the opening parenthesis: operands and attributes.
    """

    name: str
    shape: str
    kind: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return _OPERAND.findall(self.rest.partition(")")[0])


class Program:
    """The instructions of a compiled program by computation, and how often each one runs."""

    def __init__(self, text: str):
        self._computations: dict[str, list[Instruction]] = {}
        self._shapes: dict[str, str] = {}  # of every instruction's result, by its name
        entry = None
        instructions: list[Instruction] = []
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                is_entry, name = match.groups()
                instructions = self._computations.setdefault(name, [])
                entry = name if is_entry else entry
            elif match := _INSTRUCTION.match(line):
                instruction = Instruction(*match.groups())
                instructions.append(instruction)
                self._shapes[instruction.name] = instruction.shape
        self._runs = dict.fromkeys(self._computations, 0)
        if entry is not None:
            self._count_runs(entry, 1)

    def _count_runs(self, name: str, times: int) -> None:
        """Adds `times` runs to a computation and to all that it calls."""
        self._runs[name] += times
        for instruction in self._computations[name]:
            called = _CALLED.findall(instruction.rest)
            if instruction.kind == "conditional":
                called += _FIRST_BRANCH.findall(instruction.rest)
            trips = self._trip_count(instruction) if instruction.kind == "while" else 1
            for computation in called:
                if computation in self._computations:
                    self._count_runs(computation, times * trips)

    def _trip_count(self, loop: Instruction) -> int:
        """Returns how often a loop runs: the compiler's note, or the limit of its counter."""
        if match := _TRIP_COUNT.search(loop.rest):
            return int(match[1])
        condition = self._computations[_CONDITION.search(loop.rest)[1]]
        constants = {
            instruction.name: instruction.rest.partition(")")[0]
            for instruction in condition
            if instruction.kind == "constant"
        }
        for instruction in condition:
            if instruction.kind == "compare" and "direction=LT" in instruction.rest:
                for operand in instruction.operands:
                    if operand in constants:
                        return int(constants[operand])
        return 1

    def _executed(self) -> Iterator[tuple[Instruction, int]]:
        """Yields each instruction that runs, and how often."""
        for name, instructions in self._computations.items():
            if self._runs[name]:
                for instruction in instructions:
                    yield instruction, self._runs[name]

    def matmul_flops(self) -> int:
        """Returns the FLOPs of all matrix products of one device, two for each multiply-add."""
        return sum(
            times * 2 * math.prod(_sizes(instruction.shape)) * self._contracted_size(instruction)
            for instruction, times in self._executed()
            if instruction.kind in ("dot", "convolution")
        )

    def _contracted_size(self, product: Instruction) -> int:
        """Returns how many multiply-adds make one number of the result."""
        if product.kind == "dot":
            sizes = _sizes(self._shapes[product.operands[0]])
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.rest)[1]
            return math.prod(sizes[int(axis)] for axis in axes.split(",") if axis)
        # On TPUs XLA writes a product as a convolution. The input features ("i") are summed. A
        # window axis (a digit) is summed if the result has size 1 there; else it is a batch axis.
        kernel_axes, result_axes = re.search(r"dim_labels=\w+_(\w+)->(\w+)", product.rest).groups()
        result_sizes = dict(zip(result_axes, _sizes(product.shape), strict=True))
        kernel_sizes = zip(kernel_axes, _sizes(self._shapes[product.operands[1]]), strict=True)
        return math.prod(
            size
            for axis, size in kernel_sizes
            if axis == "i" or (axis.isdecimal() and result_sizes[axis] == 1)
        )

    def collectives(self) -> dict[str, dict[str, int]]:
        """Returns kind -> {"count": how many run, "bytes": of their results on one device}."""
        totals: dict[str, dict[str, int]] = {}
        for instruction, times in self._executed():
            kind = instruction.kind.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            sizes = [_bytes(*array) for array in _ARRAY.findall(instruction.shape)]
            # The shape of an asynchronous one has its operands too, before its results.
            is_asynchronous = kind != instruction.kind
            size = max(sizes, default=0) if is_asynchronous else sum(sizes)
            total = totals.setdefault(kind, {"count": 0, "bytes": 0})
            total["count"] += times
            total["bytes"] += times * size
        return totals


def _sizes(shape: str) -> list[int]:
    """Returns the sizes of the axes of "f32[8,128]"."""
    return [int(size) for size in _ARRAY.search(shape)[2].split(",") if size]


def _bytes(dtype: str, sizes: str) -> int:
    """Returns the bytes of an array, as for ("f32", "8,128")."""
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
