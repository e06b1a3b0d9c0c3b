"""How many labels a model gets right."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.errors import UserError
from qkvjax.evaluation import SOLVED
from qkvjax.models.lm import LanguageModel
from qkvjax.parallel import rules
from qkvjax.training.loss import cross_entropy


@functools.partial(jax.jit, static_argnames="dtype")
def judge(model, batch: Mapping[str, jax.Array], *, dtype) -> tuple[jax.Array, jax.Array]:
    """(whether each label is the likeliest class, its -log p), bool and float [B, labels]."""
    inputs = batch["inputs"], batch["positions"], batch.get("segment_ids")
    if isinstance(model, LanguageModel):  # logits of padding too, as in training
        logits = model.logits(model.hidden(*inputs, dtype=dtype)[0])
    else:
        logits = model(*inputs, dtype=dtype)
    nats, _ = cross_entropy(logits, batch["targets"], batch["weights"])
    right = jnp.argmax(logits, axis=-1) == batch["targets"]
    return rules.replicate(right), rules.replicate(nats)


def score(model, dataset, *, batch_size: int, split="validation", max_labels=None,
          dtype=jnp.float32, mesh=None) -> dict[str, float]:  # fmt: skip
    """Scores a model on the labels of one split.

    Returns:
      accuracy: the part of the scored labels whose class is the likeliest.
      error: 1 - accuracy.
      class_accuracy: the mean over classes of the accuracy on the labels of that class, which
        rare classes count in as much as frequent ones.
      solved: 1 if accuracy is at least SOLVED, else 0; its mean over runs is the fraction that
        learned a task where runs either do or do not.
      loss: nats a label.
      num_labels: how many were scored.

    Raises:
      UserError: nothing to score.
    """
    nats, right, there = 0.0, np.zeros(0, np.int64), np.zeros(0, np.int64)
    for batch in dataset.scored_batches(batch_size, max_labels, split):
        counts = batch["weights"] > 0
        targets = batch["targets"][counts]
        named = ("inputs", "targets", "positions", "segment_ids", "weights")
        batch = {name: batch[name] for name in named if name in batch}
        placed = batch if mesh is None else rules.place(batch, mesh)
        correct, loss = jax.device_get(judge(model, placed, dtype=dtype))
        nats += float(loss.astype(np.float64).sum())
        classes = max(len(there), targets.max(initial=-1) + 1)
        count = lambda labels: np.bincount(labels, minlength=classes)  # noqa: B023, E731
        there = count(targets) + np.pad(there, (0, classes - len(there)))
        right = count(targets[correct[counts]]) + np.pad(right, (0, classes - len(right)))
    labels = int(there.sum())
    if not labels:
        raise UserError("there is no label to score")
    accuracy = float(right.sum() / labels)
    seen = there > 0
    return {
        "accuracy": accuracy, "error": float((labels - right.sum()) / labels),
        "class_accuracy": float(np.mean(right[seen] / there[seen])),
        "solved": float(accuracy >= SOLVED), "loss": nats / labels, "num_labels": labels,
    }  # fmt: skip
