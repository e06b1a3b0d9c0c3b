"""Splash attention, jax's own kernel for TPUs.

It knows two tensors: with K = V it loads the one twice and adds two gradients. Tiles that the
causal mask or the window hides are skipped; which ones is known before the kernel starts. Segments
of packed documents are compared inside it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jaxtyping import Array, Float, Int

from qkvjax.errors import UserError
from qkvjax.kernels import limits

WIDTHS = range(8, 257, 8)
DTYPES = ("float32", "bfloat16")
# Sides of a tile: the first one by which a sequence is padded by at most an eighth. Tiles of 512
# fit the 16 MB of VMEM that a kernel gets on a v5e. Neither tuned nor timed.
SIDES = (512, 256, 128)


def refusal(q, v=None, *, q_pe=None, **_) -> str | None:
    """Returns why this kernel does not support these arguments; None where it does."""
    return limits.refusal(q, v, WIDTHS, DTYPES, {"a second part of the scores": q_pe})


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"] | None = None,
    *,
    causal: bool = True,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    q_pe: Float[Array, "B T N P"] | None = None,
    k_pe: Float[Array, "B T K P"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N _"]:
    """Computes `kernels.dispatch.attention`, whose arguments these are.

    Args:
      interpret: run on any machine, slowly.

    Raises:
      UserError: for the reason that `refusal` returns.
    """
    if reason := refusal(q, v, q_pe=q_pe):
        raise UserError(f"splash does not support these arguments: {reason}; use impl='auto'")
    _, length, heads, width = q.shape
    side = next((s for s in SIDES if -length % s <= length // 8), SIDES[-1])
    fill = -length % side
    run = library.make_splash_mha_single_device(
        library.MultiHeadMask([_mask(length + fill, causal, window)] * heads),
        block_sizes=_block_sizes(side),
        interpret=interpret,
    )

    def by_head(x):  # [B, T, N, H] -> [B, N, T with padding, H]
        return jnp.pad(x, [(0, 0), (0, fill), (0, 0), (0, 0)]).swapaxes(1, 2)

    if fill and not causal and segment_ids is None:
        # Nothing else hides the padding: the tokens become a segment, and the padding another one.
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    q = q * jnp.asarray(width**-0.5 if scale is None else scale, q.dtype)  # it does not scale
    operands = by_head(q), by_head(k), by_head(k if v is None else v)
    if segment_ids is None:
        out = jax.vmap(run)(*operands)
    else:
        padded = jnp.pad(segment_ids, [(0, 0), (0, fill)], constant_values=-1)
        out = jax.vmap(run)(*operands, library.SegmentIds(padded, padded))
    return out.swapaxes(1, 2)[:, :length]


def _mask(length: int, causal: bool, window: int | None):
    """Returns the library's mask of [length, length] pairs."""
    shape = (length, length)
    if window is not None:
        return library.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    return library.CausalMask(shape) if causal else library.FullMask(shape)


def _block_sizes(side: int):
    """Returns tiles of `side` by `side` for the three kernels: forward, keys, queries.

    A backward pass that makes all gradients at once exists. It would keep one sum of the queries'
    gradients for each tile of keys: memory that grows with the square of the length.
    """
    return library.BlockSizes(
        block_q=side,
        block_kv=side,
        block_kv_compute=side,
        block_q_dkv=side,
        block_kv_dkv=side,
        block_kv_dkv_compute=side,
        block_q_dq=side,
        block_kv_dq=side,
    )
