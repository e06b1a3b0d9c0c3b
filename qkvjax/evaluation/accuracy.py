"""Accuracy: the part of the labels whose class a model finds the likeliest."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.errors import UserError
from qkvjax.evaluation import SOLVED, scoring
from qkvjax.evaluation.items import Items
from qkvjax.models.lm import LanguageModel
from qkvjax.models.loss import cross_entropy, label_scores
from qkvjax.parallel import rules


@functools.partial(jax.jit, static_argnames="dtype")
def judge(model, batch: Mapping[str, jax.Array], *, dtype) -> tuple[jax.Array, jax.Array]:
    """Judges the labels of a batch.

    Returns:
      (whether each label is the likeliest class, bool [B, labels]; its -log p, float [B, labels],
      0 where it is not scored).
    """
    inputs = batch["inputs"], batch["positions"], batch.get("segment_ids")
    labels = batch["targets"], batch["weights"]
    if isinstance(model, LanguageModel):
        # By chunks: the vocabulary is too wide to hold all logits.
        x, _ = model.hidden(*inputs, dtype=dtype)
        nats, right = label_scores(x, model.head_matrix(), *labels)
    else:
        logits = model(*inputs, dtype=dtype)
        nats, _ = cross_entropy(logits, *labels)
        right = jnp.argmax(logits, axis=-1) == batch["targets"]
    return rules.replicate(right), rules.replicate(nats)


def score(
    model,
    dataset,
    *,
    batch_size: int,
    split: str = "validation",
    max_labels: int | None = None,
    dtype=jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    num_labels: float = 0,
    program: Callable | None = None,
    pulse: Callable[[], None] = lambda: None,
    log: Callable[[str], None] | None = None,
    items: Items | None = None,
) -> dict[str, float]:
    """Scores a model on the labels of one split.

    Args:
      model: any model of `qkvjax.models`.
      dataset: text or labelled examples.
      batch_size: rows of a batch over all devices.
      split: "validation" or "train".
      max_labels: about how many labels to score; None scores all.
      dtype: of activations and matrix products.
      mesh: where the model is; None is one device.
      num_labels, pulse, log: as in `scoring.run`.
      program: a compiled `judge` for batches of this size; None compiles one.
      items: gets the wrong labels (value) and all labels (weight) of each example.

    Returns:
      accuracy: the part of the scored labels whose class is the likeliest.
      error: 1 - accuracy.
      class_accuracy: the mean over classes of the accuracy on the labels of that class. Rare
        classes count as much as frequent ones.
      solved: 1 if accuracy is at least SOLVED, else 0. Its mean over runs is the fraction of runs
        that learned the task.
      loss: nats per label.
      num_labels: how many were scored.

    Raises:
      UserError: nothing to score.
    """
    batches = dataset.scored_batches(batch_size, max_labels, split)
    run_program = program or functools.partial(judge, dtype=dtype)
    nats: list[float] = []
    labels_of_class = collections.Counter()
    right_of_class = collections.Counter()
    results = scoring.run(
        functools.partial(run_program, model), batches, mesh, num_labels, pulse=pulse, log=log
    )
    for batch, (is_right, nats_of_labels) in results:
        is_scored = batch["weights"] > 0
        nats.append(math.fsum(nats_of_labels.ravel().astype(np.float64)))
        targets = batch["targets"][is_scored]
        right = is_right[is_scored]
        labels_of_class.update(targets.tolist())
        right_of_class.update(targets[right].tolist())
        if items is not None:
            items.add(batch["items"][is_scored], ~right, np.ones(len(right), np.int64))
    labels = labels_of_class.total()
    if not labels:
        raise UserError("there is no label to score: give more data, or another split")
    num_right = right_of_class.total()
    by_class = [right_of_class[label] / count for label, count in labels_of_class.items()]
    return {
        "accuracy": num_right / labels,
        "error": (labels - num_right) / labels,
        "class_accuracy": math.fsum(by_class) / len(by_class),
        "solved": float(num_right / labels >= SOLVED),
        "loss": math.fsum(nats) / labels,
        "num_labels": labels,
    }
