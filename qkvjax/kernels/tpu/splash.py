"""Splash attention, jax's own kernel for TPUs. It knows two tensors: with K = V it loads the one
twice and adds two gradients.

Its tiles are skipped by the masks before it starts; segments of packed documents are compared
inside.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library

from qkvjax.errors import UserError
from qkvjax.kernels import limits

WIDTHS = range(8, 257, 8)
DTYPES = ("float32", "bfloat16")
# Sides of a tile: the first by which a sequence is padded by at most an eighth. Of 512 the tiles
# fit the 16 MB of VMEM that a kernel gets on a v5e; neither tuned nor timed.
SIDES = (512, 256, 128)


def refusal(q, v=None, *, softcap=None, q_pe=None, **_) -> str | None:
    """Why this kernel does not take such arguments; None where it does."""
    return limits.refusal(q, v, WIDTHS, DTYPES, second_part_of_the_scores=q_pe, softcap=softcap)


def attention(
    q,
    k,
    v=None,
    *,
    causal=True,
    segment_ids=None,
    window=None,
    scale=None,
    q_pe=None,
    k_pe=None,
    interpret: bool = False,
) -> jax.Array:
    """As `kernels.dispatch.attention`, whose arguments these are.

    Args:
      interpret: run on any machine, slowly.

    Raises:
      UserError: `refusal` has an answer.
    """
    if why := refusal(q, v, q_pe=q_pe):
        raise UserError(f"splash does not support these arguments: {why}; use impl='auto'")
    _, length, heads, width = q.shape
    side = next((s for s in SIDES if -length % s <= length // 8), SIDES[-1])
    fill = -length % side
    places = (length + fill, length + fill)
    if window is not None:
        mask = library.LocalMask(places, (window - 1, 0 if causal else window - 1), 0)
    elif causal:
        mask = library.CausalMask(places)
    else:
        mask = library.FullMask(places)
    if fill and not causal and segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    # The backward pass that makes all gradients at once would keep one sum of the queries'
    # gradients for each tile of keys: memory that grows with the square of the length.
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    names += ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    run = library.make_splash_mha_single_device(
        library.MultiHeadMask([mask] * heads),
        block_sizes=library.BlockSizes(**dict.fromkeys(names, side)),
        interpret=interpret,
    )

    def by_head(x):
        return jnp.pad(x, [(0, 0), (0, fill), (0, 0), (0, 0)]).swapaxes(1, 2)

    q = q * jnp.asarray(width**-0.5 if scale is None else scale, q.dtype)  # it does not scale
    operands = by_head(q), by_head(k), by_head(k if v is None else v)
    if segment_ids is None:
        out = jax.vmap(run)(*operands)
    else:
        padded = jnp.pad(segment_ids, [(0, 0), (0, fill)], constant_values=-1)
        out = jax.vmap(run)(*operands, library.SegmentIds(padded, padded))
    return out.swapaxes(1, 2)[:, :length]
