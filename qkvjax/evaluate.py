"""Score a checkpoint on held-out text, its own or another corpus.

  qkvjax evaluate --workdir=runs/first
  qkvjax evaluate --workdir=runs/first --data=text:my_book.txt
  qkvjax evaluate --workdir=runs/first --tasks=bits_per_byte --step=500

Without --data the run's own validation documents are scored; with it, the whole corpus. Each
document is read on its own in windows of data.seq_len and every token is scored once, so that
the score does not depend on the batch size. Lines are added to WORKDIR/evaluation.jsonl.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from qkvjax import cli
from qkvjax.errors import UserError, did_you_mean


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "the trained run", flag_values=values)
    flags.DEFINE_list("tasks", ["bits_per_byte"], "what to score, with commas", flag_values=values)
    flags.DEFINE_string("data", None, "another corpus, as data.source names it", flag_values=values)
    flags.DEFINE_integer("step", None, "which checkpoint; the newest if unset", flag_values=values)
    flags.DEFINE_integer("batch_size", None, "rows at a time; does not change the score",
                         flag_values=values)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(argv, __doc__, define, body)


def body(values: flags.FlagValues) -> None:
    tasks = {"bits_per_byte": score_text}
    for task in values.tasks or [""]:
        if task not in tasks:
            raise UserError(
                f"there is no task {task!r}: use {', '.join(tasks)}{did_you_mean(task, tasks)}"
            )
    if not values.workdir:
        raise UserError("--workdir=DIR is missing: which run should be scored?")
    if values.batch_size is not None and not 1 <= values.batch_size <= 2**20:
        raise UserError(f"--batch_size={values.batch_size} must be at least 1 and at most 2^20")
    from qkvjax.parallel import host

    host.keep_freed_memory()
    from qkvjax.training.metrics import append_line
    from qkvjax.training.restore import load_model

    model, tokenizer, config, step = load_model(values.workdir, values.step)
    for task in values.tasks:
        for line in tasks[task](model, config, values):
            line = {"task": task, **line, "step": step, "data": values.data or config.data.source}
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            append_line(Path(values.workdir) / "evaluation.jsonl", line | {"date": date})
            print(
                f"{line['metric']} {line['value']:.6f} on {line['num_items']:,}"
                f" labels of {line['data']} ({line['tokenizer']} tokens, pads"
                f" {100 * line['pad_fraction']:.1f} %), step {step}"
            )


def score_text(model, config, values) -> list[dict]:
    """Bits per byte and perplexity of the validation documents, or of --data as a whole."""
    from qkvjax.data.dataset import prepare
    from qkvjax.evaluation.language import score

    data = config.data
    dataset = prepare(
        data.source if values.data is None else values.data, data.tokenizer, data.seq_len,
        data.score_pads, whole=values.data is not None, log=print,
    )  # fmt: skip
    found = score(
        model, dataset, batch_size=values.batch_size or data.batch_size,
        dtype=config.train.compute_dtype,
    )  # fmt: skip
    common = {
        "num_items": int(found["num_labels"]),
        "num_bytes": found["num_bytes"],
        "tokenizer": dataset.tokenizer.name,
        "pad_fraction": found["pad_fraction"],
        "data_digest": dataset.digest,
    }
    return [
        {"metric": name, "value": found[name], **common} for name in ("bits_per_byte", "perplexity")
    ]


if __name__ == "__main__":
    sys.exit(main())
