"""Scores of language models."""

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
    """The language-model score: nats / ln 2 / bytes, over the scored tokens.

    What is scored (`qkvjax.data.text_dataset.Dataset.scored_batches`): each document on its own is
    s = [separator, t1, ..., tn], cut into windows of T = `data.seq_len`. Window w reads
    s[wT : wT + T] and predicts s[wT + 1 : wT + T + 1]; positions restart in each window and it
    sees nothing before it. Short windows share a row and do not see each other.

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

    What shares a row follows from the documents alone, and labels are added up in order, so the
    score depends neither on the batch size nor on the number of devices, but for the rounding of
    matrix products.

    Args:
      program: a compiled `label_nats` for batches of this size; None compiles one.
      items: gets the bits (value) and bytes (weight) of each document, of the training split of
        each row.
      num_labels, pulse, log: of `scoring.run`.

    Returns:
      bits_per_byte, perplexity (per label of the data set's tokenizer), loss (nats a label),
      num_labels, num_bytes, pad_fraction (scored labels that are padding).

    Raises:
      UserError: nothing to score.
    """
    batches = dataset.scored_batches(batch_size, max_labels, split)
    run_program = program or functools.partial(label_nats, dtype=dtype)
    items = Items() if items is None else items
    labels = 0.0
    pads = 0
    scored = scoring.run(
        functools.partial(run_program, model), batches, mesh, num_labels, pulse=pulse, log=log
    )
    for batch, nats in scored:
        counts = batch["weights"] > 0
        bits = np.asarray(nats, np.float64)[counts] / math.log(2)
        items.add(batch["items"][counts], bits, batch["num_bytes"][counts])
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
        "perplexity": math.exp(min(loss, 700)),
        "loss": loss,
        "num_labels": labels,
        "num_bytes": num_bytes,
        "pad_fraction": pads / labels,
    }
