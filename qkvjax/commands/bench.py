"""Measure what every sharing costs, beside three projections.

  qkvjax bench memory --config=configs/lm.py:depth=2 --workdir=runs/memory
  qkvjax bench memory --config=configs/lm.py:size=300m,recipe=paper --workdir=runs/300m \\
      --batches=4,16 --contexts=1024,2048
  qkvjax bench decode --config=configs/lm.py:depth=4 --workdir=runs/decode --contexts=8192
  qkvjax bench kernels --config=configs/lm.py:depth=4 --workdir=runs/kernels

memory: the peak that the compiler plans for a training step and for decoding, against the
sequences of a batch and against the context, for each sharing. Nothing is run and no data are
read, so that models of any size can be asked about. What is varied is varied around
data.batch_size and data.seq_len. Activations are those of the attention that this platform uses.
The workdir gets bench.jsonl (a line a program) and memory.svg; a study's workdir shows them in its
report.

decode: seconds of one attention layer for a token onto a full cache, every batch with every
context. kernels: seconds of attention over whole sequences, with two tensors and with K = V,
forward and with its gradient. Both time each implementation that this machine has, in turns.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from qkvjax.commands import cli
from qkvjax.config import resolve
from qkvjax.errors import UserError
from qkvjax.parallel import host

MEASURES = ("memory", "decode", "kernels")


FLAGS = {
    "workdir": (str, None, "where the figures are kept"),
    "batches": (
        list,
        None,
        "sequences of a batch, with commas; unset means a fourth of"
        " data.batch_size, all and four times it",
    ),
    "contexts": (
        list,
        None,
        "tokens of a sequence; unset means half, one and two times data.seq_len",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv if argv is None else argv)
    what = given.pop(1) if len(given) > 1 and not given[1].startswith("-") else None
    return cli.run(given, __doc__, FLAGS, lambda values: body(values, what), config="required")


def body(values: flags.FlagValues, what: str | None) -> None:
    if what not in MEASURES:
        raise UserError(
            f"what should be measured? Write qkvjax bench {MEASURES[0]} --config=PATH (or"
            f" {' or '.join(MEASURES[1:])})" + (f", not bench {what}" if what else "")
        )
    host.keep_freed_memory()  # before threads have arenas of their own
    config = resolve(values.config)
    batches = _numbers("batches", values.batches, config.data.batch_size, (0.25, 1, 4))
    contexts = _numbers("contexts", values.contexts, config.data.seq_len, (0.5, 1, 2))
    from qkvjax.costs import memory, speed
    from qkvjax.files import read_lines, write_lines
    from qkvjax.report import drawing
    from qkvjax.workdir import open_workdir

    workdir = open_workdir(values.workdir)
    measure = {"memory": memory.measure, "decode": speed.decode, "kernels": speed.kernels}[what]
    records = measure(config, batches, contexts, log=lambda line: print(line, flush=True))
    file = workdir / "bench.jsonl"
    kept = [r for r in read_lines(file, what=str) if r["what"] != what]
    write_lines(file, kept + records)  # measured anew, a figure replaces the one before
    if what != "memory":
        print("\n".join(["", *speed.table(records)]))
        return
    drawing.write(drawing.drawn({"memory": lambda: memory.plot(records)}), workdir)
    print("\n".join(["", *memory.table(records), "", f"plot: {workdir / 'memory.svg'}"]))


def _numbers(name: str, given: list[str] | None, base: int, factors) -> list[int]:
    """The values to vary over, smallest first; the base is always among them."""
    if given is None:
        return sorted({max(1, int(base * factor)) for factor in factors})
    if not all(text.isdecimal() and 1 <= int(text) < 2**31 for text in given):
        raise UserError(f"--{name}={','.join(given)}: write whole numbers from 1 on, with commas")
    return sorted({base, *map(int, given)})
