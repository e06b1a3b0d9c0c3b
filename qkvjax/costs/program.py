"""What a compiled program does, read from its text: matrix products and collectives.

The compiler's own count of FLOPs takes the body of a loop once; here it counts as often as it
runs. Of a conditional the first branch counts, the one of a false condition: the usual way of
`parallel.experts`, whose other branch is a fallback.
"""

from __future__ import annotations

import math
import re

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCH = re.compile(r"(?:branch_computations=\{|false_computation=)%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')


class Program:
    """The instructions of a compiled program by computation, and how often each one runs."""

    def __init__(self, text: str):
        self._bodies: dict[str, list[tuple[str, str, str, str]]] = {}
        self._types: dict[str, str] = {}
        entry, body = None, []
        for line in text.splitlines():
            if opened := _COMPUTATION.match(line):
                body = self._bodies.setdefault(opened[2], [])
                entry = opened[2] if opened[1] else entry
            elif found := _INSTRUCTION.match(line):
                body.append(found.groups())
                self._types[found[1]] = found[2]
        self._runs = dict.fromkeys(self._bodies, 0)
        if entry is not None:
            self._count(entry, 1)

    def _count(self, name: str, times: int) -> None:
        self._runs[name] += times
        for _, _, kind, rest in self._bodies[name]:
            trips = self._trips(rest) if kind == "while" else 1
            usual = _BRANCH.findall(rest) if kind == "conditional" else []
            for called in [*_CALLED.findall(rest), *usual]:
                if called in self._bodies:
                    self._count(called, times * trips)

    def _trips(self, rest: str) -> int:
        """How often a loop runs: what the compiler notes, or what its counter is compared to."""
        if noted := _TRIPS.search(rest):
            return int(noted[1])
        condition = self._bodies[re.search(r"condition=%?([\w.\-]+)", rest)[1]]
        constants = {name: rest for name, _, kind, rest in condition if kind == "constant"}
        for _, _, kind, rest in condition:
            if kind == "compare" and "direction=LT" in rest:
                for name in re.findall(r"%([\w.\-]+)", rest.partition(")")[0]):
                    if name in constants:
                        return int(constants[name].partition(")")[0])
        return 1

    def _all(self):
        for name, body in self._bodies.items():
            for _, shape, kind, rest in body:
                if self._runs[name]:
                    yield shape, kind, rest, self._runs[name]

    def matmul_flops(self) -> int:
        """FLOPs of all matrix products of one device, two a multiply-add."""
        return sum(
            times * 2 * math.prod(_sizes(shape)) * self._contracted(kind, shape, rest)
            for shape, kind, rest, times in self._all()
            if kind in ("dot", "convolution")
        )

    def _contracted(self, kind: str, shape: str, rest: str) -> int:
        """Products that are summed for a number of the result."""
        operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
        if kind == "dot":
            sizes = _sizes(self._types[operands[0]])
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
            return math.prod(sizes[int(axis)] for axis in axes.split(",") if axis)
        # XLA's TPU writes a product as a convolution: its input features are summed, and a window
        # is too if it leaves one place; else it stands for a batch.
        kernel, result = re.search(r"dim_labels=\w+_(\w+)->(\w+)", rest).groups()
        left = dict(zip(result, _sizes(shape), strict=True))
        sizes = zip(kernel, _sizes(self._types[operands[1]]), strict=True)
        return math.prod(
            size for label, size in sizes if label == "i" or label.isdecimal() and left[label] == 1
        )

    def collectives(self) -> dict[str, dict[str, int]]:
        """kind -> how many run, and the bytes of their results on one device."""
        found = {}
        for shape, kind, _, times in self._all():
            name = kind.removesuffix("-start")
            if name in COLLECTIVES:
                record = found.setdefault(name, {"count": 0, "bytes": 0})
                parts = [_bytes(*part) for part in _ARRAY.findall(shape)]
                # An asynchronous one carries its operands along, before its results.
                size = sum(parts) if kind == name else max(parts, default=0)
                record["count"] += times
                record["bytes"] += times * size
        return found


def _sizes(shape: str) -> list[int]:
    return [int(size) for size in _ARRAY.search(shape)[2].split(",") if size]


def _bytes(kind: str, sizes: str) -> int:
    bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 8)
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
