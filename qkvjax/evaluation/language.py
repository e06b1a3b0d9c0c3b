"""Scores of language models: bits per byte and perplexity.

The two divide the same sum of -log p by different numbers: bits per byte by the bytes of the scored
tokens, perplexity by the scored labels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.errors import UserError
from qkvjax.evaluation import scoring
from qkvjax.evaluation.items import Items
from qkvjax.models.loss import label_scores
from qkvjax.parallel import rules


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Returns the language-model score: nats / ln 2 / bytes, over the scored tokens.

    What is scored (`qkvjax.data.text_dataset.Dataset.scored_batches`): a document of n tokens is
    s = [separator, t1, ..., tn], cut into windows of T = `data.seq_len` labels. Window w reads
    s[wT : wT + T] and predicts s[wT + 1 : wT + T + 1]. Positions restart in each window, and it
    does not see the windows before it. Short windows share a row and do not see each other. With
    n = 6 and T = 4:

        window 0    reads  sep t1  t2  t3        window 1    reads  t4  t5
                 predicts  t1  t2  t3  t4                 predicts  t5  t6

    - The first token of a document is scored: its context is the separator. The first target of a
      later window has one token of context, the last target of the window before.
    - Every token t1..tn is scored exactly once.
    - No separator is scored: none follows tn, and padding weighs 0.
    - The bytes are those of the scored tokens in the document. Their sum over a corpus is its size,
      so that scores with different tokenizers can be compared.

    The training split is scored in its packed rows, without the separators. With
    `data.score_pads` every label counts, padding included, and padding has no bytes.

    Args:
      nats: sum of -log p over the scored labels.
      num_bytes: sum of the bytes of the scored tokens.

    Returns:
      Bits per byte; nan without a byte.
    """
    return nats / math.log(2) / num_bytes if num_bytes else math.nan


@functools.partial(jax.jit, static_argnames="dtype")
def label_nats(model, batch: Mapping[str, jax.Array], *, dtype) -> jax.Array:
    """Returns -log p of each label, 0 where it is not scored: arrays [B, T] -> float32 [B, T]."""
    x, _ = model.hidden(batch["inputs"], batch["positions"], batch["segment_ids"], dtype=dtype)
    nats, _ = label_scores(x, model.head_matrix(), batch["targets"], batch["weights"])
    return rules.replicate(nats)


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
    """Scores a language model on one split of a data set.

    The documents alone decide which windows share a row, and labels are added up in order. So the
    score depends neither on the batch size nor on the number of devices, except through the
    rounding of matrix products.

    Args:
      model: a LanguageModel.
      dataset: a `qkvjax.data.text_dataset.Dataset`.
      batch_size: rows of a batch over all devices.
      split: "validation" or "train".
      max_labels: about how many labels to score; None scores all.
      dtype: of activations and matrix products.
      mesh: where the model is; None is one device.
      num_labels, pulse, log: as in `scoring.run`.
      program: a compiled `label_nats` for batches of this size; None compiles one.
      items: gets the bits (value) and bytes (weight) of each document; in the training split, of
        each row.

    Returns:
      bits_per_byte; loss, nats per label; perplexity, exp of the loss, which therefore depends on
      the tokenizer; num_labels and num_bytes, those that were scored; pad_fraction, the part of
      the scored labels that is padding.

    Raises:
      UserError: nothing to score.
    """
    batches = dataset.scored_batches(batch_size, max_labels, split)
    run_program = program or functools.partial(label_nats, dtype=dtype)
    items = Items() if items is None else items
    labels = 0.0
    pads = 0
    results = scoring.run(
        functools.partial(run_program, model), batches, mesh, num_labels, pulse=pulse, log=log
    )
    for batch, nats_of_labels in results:
        is_scored = batch["weights"] > 0
        bits = np.asarray(nats_of_labels, np.float64)[is_scored] / math.log(2)
        items.add(batch["items"][is_scored], bits, batch["num_bytes"][is_scored])
        labels += float(batch["weights"].sum())
        pads += int(batch["pad_labels"].sum())
    if not labels:
        raise UserError("there is no token to score: give a longer corpus")
    sums = items.arrays()
    nats = math.fsum(sums["value"]) * math.log(2)
    num_bytes = int(sums["weight"].sum())
    loss = nats / labels
    return {
        "bits_per_byte": bits_per_byte(nats, num_bytes),
        "perplexity": math.exp(min(loss, 700)),  # exp(710) exceeds a float
        "loss": loss,
        "num_labels": labels,
        "num_bytes": num_bytes,
        "pad_fraction": pads / labels,
    }
