"""Scores of language models."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.errors import UserError
from qkvjax.parallel import rules
from qkvjax.training.loss import cross_entropy


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """The language-model score: nats / ln 2 / bytes, over the scored tokens.

    What is scored (`qkvjax.data.dataset.Dataset.scored_batches`): each document on its own is
    s = [separator, t1, ..., tn], cut into windows of T = `data.seq_len`. Window w reads
    s[wT : wT + T] and predicts s[wT + 1 : wT + T + 1]; positions restart in each window and it
    sees nothing before it.

    - The first token of a document is scored: the separator stands before it. The first target
      of a later window has the last token of the window before as its whole context.
    - Every token t1..tn is scored exactly once.
    - No separator is scored: there is none behind tn, and padding weighs 0.
    - The bytes are those of the scored tokens in the document, so that the sum over a corpus is
      its size and tokenizers compare.

    The training split is scored in its packed rows, separators excepted; with
    `data.score_pads` every label counts, padding included, and padding has no bytes.

    Args:
      nats: sum of -log p over the scored labels.
      num_bytes: sum of the bytes of the scored tokens.

    Returns:
      Bits a byte; nan without a byte.
    """
    return nats / math.log(2) / num_bytes if num_bytes else math.nan


@functools.partial(jax.jit, static_argnames="dtype")
def row_nats(model, batch: Mapping[str, jax.Array], *, dtype) -> jax.Array:
    """Sum of -log p over the scored labels of each row: arrays [B, T] -> float32 [B]."""
    inputs = batch["inputs"], batch["positions"], batch["segment_ids"]
    logits = model.logits(model.hidden(*inputs, dtype=dtype)[0])  # of padding too, as in training
    nats, _ = cross_entropy(logits, batch["targets"], batch["weights"])
    return rules.replicate(jnp.sum(nats, axis=-1))


def score(model, dataset, *, batch_size: int, split="validation", max_labels=None,
          dtype=jnp.float32, mesh=None) -> dict[str, float]:  # fmt: skip
    """Scores a language model on one split of a data set.

    Rows are summed one by one and added up in float64 on the host, so the score does not depend
    on the batch size.

    Returns:
      bits_per_byte, perplexity (per label of the data set's tokenizer), loss (nats a label),
      num_labels, num_bytes, pad_fraction (scored labels that are padding).

    Raises:
      UserError: nothing to score.
    """
    nats, labels, num_bytes, pads = 0.0, 0.0, 0, 0
    for batch in dataset.scored_batches(batch_size, max_labels, split):
        counts = {name: batch.pop(name) for name in ("num_bytes", "pad_labels")}
        labels += float(batch["weights"].sum())
        num_bytes += int(counts["num_bytes"].sum())
        pads += int(counts["pad_labels"].sum())
        placed = batch if mesh is None else rules.place(batch, mesh)
        nats += float(np.asarray(row_nats(model, placed, dtype=dtype), np.float64).sum())
    if not labels:
        raise UserError("there is no token to score: give a longer corpus")
    return {
        "bits_per_byte": bits_per_byte(nats, num_bytes),
        "perplexity": math.exp(min(nats / labels, 700)), "loss": nats / labels,
        "num_labels": labels, "num_bytes": num_bytes, "pad_fraction": pads / labels,
    }  # fmt: skip
