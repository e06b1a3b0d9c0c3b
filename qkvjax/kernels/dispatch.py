"""One op for every implementation of attention.

`impl` is "auto" or a name of IMPLEMENTATIONS. "auto" takes the fastest that this machine
runs: today that is "xla" everywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qkvjax.errors import UserError, did_you_mean
from qkvjax.kernels import reference, xla
from qkvjax.parallel import rules

IMPLEMENTATIONS = {"xla": xla.attention, "reference": reference.attention}


def choose(impl: str = "auto") -> str:
    """The implementation that `impl` stands for; raises UserError for one that is not here."""
    if impl == "auto":
        return "xla"
    if impl not in IMPLEMENTATIONS:
        raise UserError(
            f"attention implementation {impl!r} is unknown: this machine has"
            f" {', '.join(IMPLEMENTATIONS)}{did_you_mean(impl, IMPLEMENTATIONS)}"
        )
    return impl


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None = None,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_pe: jax.Array | None = None,
    k_pe: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Attention of a whole sequence onto itself.

    Args:
      q: [B, T, N, H] queries.
      k: [B, T, K, H] keys, each for N / K query heads.
      v: [B, T, K, H] values; None says that the key tile is the value tile, which a kernel
        may then load once.
      causal: a query sees keys at or before its place.
      segment_ids: int [B, T]; a query sees its own segment.
      window: a query sees keys fewer than `window` places away.
      scale: of the scores; None means 1 / sqrt(H).
      softcap: bound of the scores by tanh.
      q_pe, k_pe: [B, T, N, P] and [B, T, K, P], a second part of the scores.
      impl: "auto" or a name.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    places = jnp.arange(q.shape[1])[None]
    mask = reference.visible(
        places,
        places,
        causal=causal,
        window=window,
        q_segments=segment_ids,
        k_segments=None if segment_ids is None else rules.gather_sequence(segment_ids),
    )
    run = IMPLEMENTATIONS[choose(impl)]
    skips = causal and not rules.shards_sequence()  # tiles of queries would cross devices
    return run(
        q, k, v, mask=mask, causal=skips, window=window, scale=scale, softcap=softcap, q_pe=q_pe,
        k_pe=k_pe,
    )  # fmt: skip


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None = None,
    *,
    positions: jax.Array,
    window: int | None = None,
    scale: float | None = None,
    q_pe: jax.Array | None = None,
    k_pe: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Causal attention of a few new tokens onto a cache that already holds them.

    Args:
      q: [B, T, N, H] queries of the new tokens.
      k: [B, S, K, H] the cache's keys, slot s holding position s; slots behind the last
        position may hold anything finite.
      v: [B, S, K, H] values; None says that the keys are the values.
      positions: int [B, T], the queries' places.
      q_pe, k_pe: [B, T, N, P] and [B, S, K, P], a second part of the scores.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    slots = jnp.arange(k.shape[1])[None]
    mask = reference.visible(positions, slots, causal=True, window=window)
    run = IMPLEMENTATIONS[choose(impl)]
    return run(q, k, v, mask=mask, scale=scale, q_pe=q_pe, k_pe=k_pe)
