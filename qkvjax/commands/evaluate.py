"""Score a checkpoint on held-out data, its own or others.

  qkvjax evaluate --workdir=runs/first
  qkvjax evaluate --workdir=runs/first --data=text:my_book.txt
  qkvjax evaluate --workdir=runs/first --tasks=bits_per_byte --step=500
  qkvjax evaluate --workdir=runs/first --verify            reads every checkpoint, scores nothing

Without --data the run's own validation documents are scored, provided that its data are still what
it was trained on; with --data, the whole corpus. Each document is read on its own in windows of
data.seq_len and every token is scored once, so that the score does not depend on the batch size.
Parameters and rows are sharded over all devices. Tasks: bits_per_byte and perplexity of text;
accuracy, of all labels and as a mean over classes, of what has labels. Lines are added to
WORKDIR/evaluation.jsonl, and what is lost on each document or example goes to
WORKDIR/items/TASK.npz. --verify compares every array with the fingerprint that was saved beside
it; a damaged checkpoint is exit code 45.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from qkvjax.commands import cli
from qkvjax.errors import UserError, among
from qkvjax.evaluation.items import Items
from qkvjax.parallel import host

# What each task writes a line about.
TASKS = {
    "bits_per_byte": ("bits_per_byte", "perplexity"),
    "accuracy": ("accuracy", "class_accuracy"),
}


FLAGS = {
    "workdir": (str, None, "the trained run"),
    "tasks": (
        list,
        None,
        "what to score, with commas: bits_per_byte (text) or accuracy; unset"
        " means what the run was evaluated by",
    ),
    "data": (str, None, "another corpus, as data.source names it"),
    "step": (int, None, "which checkpoint; the newest if unset"),
    "verify": (bool, False, "only check that checkpoints are what was saved"),
    "batch_size": (int, None, "rows at a time; does not change the score", 1, 2**20),
    **cli.ATTENTION,
}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(argv, __doc__, FLAGS, body)


def body(values: flags.FlagValues) -> None:
    for task in () if values.tasks is None else values.tasks or [""]:
        if task not in TASKS:
            raise UserError(f"there is no task {task!r}: use {among(task, TASKS)}")
    if not values.workdir:
        raise UserError("--workdir=DIR is missing: which run should be scored?")
    if values.verify and (values.tasks or values.data):
        raise UserError("--verify scores nothing: leave --tasks and --data out")

    host.keep_freed_memory()
    if values.verify:
        verify(Path(values.workdir), values.step)
        return
    from qkvjax.data.open import check_fits, open_dataset
    from qkvjax.files import append_line
    from qkvjax.parallel import placed
    from qkvjax.parallel.mesh import for_scoring
    from qkvjax.training.identity import check_data, same_location
    from qkvjax.training.restore import load_model

    model, tokenizer, config, step = load_model(
        values.workdir, values.step, mesh=for_scoring, attention=values.attention
    )
    dataset = open_dataset(config, values.data, whole=values.data is not None, log=print)
    check_fits(dataset, model.spec)
    if values.data is None:
        check_data(Path(values.workdir), config.data.source, dataset.digest)
    elif same_location(values.data, config.data.source):
        print(f"note: {values.data} is what the run was trained on: most of this text it has seen")
    for task in values.tasks or ["bits_per_byte" if tokenizer else "accuracy"]:
        with placed.on_mesh_of(model):
            items = Items()
            scores = score(task, model, dataset, config, values.batch_size, items)
        items.save(Path(values.workdir) / "items" / f"{task}.npz")
        for line in scores:
            line = {"task": task, **line, "step": step, "data": values.data or config.data.source}
            append_line(Path(values.workdir) / "evaluation.jsonl", line | {"date": host.now()})
            told = f"{line['metric']} {line['value']:.6f} on {line['num_items']:,} labels"
            if tokenizer:
                told += f" ({tokenizer.name} tokens, pads {100 * line['pad_fraction']:.1f} %)"
            print(f"{told} of {line['data']}, step {step}")


def verify(workdir: Path, step: int | None) -> None:
    """Prints a line a checkpoint.

    Raises:
      UserError: there is none (code 2), or one is damaged (code 45).
    """
    from qkvjax.training.checkpoint import NO_INTACT_CHECKPOINT, Checkpoints, Damaged

    damaged = []
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        steps = checkpoints.choose(step)
        for candidate in steps:
            try:
                print(f"step {candidate}: intact, {checkpoints.verify(candidate)} arrays")
            except Damaged as damage:
                print(f"step {candidate}: damaged: {damage}")
                damaged.append(candidate)
    if damaged:
        raise UserError(
            f"{len(damaged)} of {len(steps)} checkpoints in {checkpoints.folder} are damaged:"
            " training and scoring pass them over",
            NO_INTACT_CHECKPOINT,
        )


def score(task: str, model, dataset, config, batch_size: int | None, items: Items) -> list[dict]:
    """Returns the lines of a task on the validation split of a data set, one a metric.

    Args:
      items: gets the scores by document or example.
    """
    from qkvjax.evaluation import scoring
    from qkvjax.evaluation.evaluators import SCORES, check_text, num_scored
    from qkvjax.parallel import placed

    check_text("--tasks", task, dataset)
    mesh = placed.mesh_of(model)
    found = SCORES[task](
        model,
        dataset,
        batch_size=batch_size or scoring.num_rows(config, mesh),
        dtype=config.train.compute_dtype,
        mesh=mesh,
        num_labels=num_scored(dataset),
        items=items,
        log=print,
    )
    common = {"num_items": int(found["num_labels"]), "data_digest": dataset.digest}
    if dataset.tokenizer is not None:
        common["tokenizer"] = dataset.tokenizer.name
        common["num_bytes"] = found.get("num_bytes")
        common["pad_fraction"] = found.get("pad_fraction", 0)
    return [{"metric": name, "value": found[name], **common} for name in TASKS[task]]
