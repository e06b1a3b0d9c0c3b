"""NVIDIA's fused attention, from a library that jax calls. It knows two tensors: with K = V it
loads the one twice and adds two gradients.
"""

from __future__ import annotations

import jax

from qkvjax.errors import UserError
from qkvjax.kernels import limits
from qkvjax.parallel.target import target

BACKEND = "cudnn"
DTYPES = ("bfloat16", "float16")


def refusal(
    q, v=None, *, causal=True, segment_ids=None, window=None, softcap=None, q_pe=None
) -> str | None:
    """Why it does not take such arguments, or would leave some out silently; None where it does."""
    if window is not None and not causal:
        return "its window only looks back (causal=True)"
    # jax allows the widths of the device that is here, whatever it compiles for.
    device = target()
    widest = 256 if device.here and device.major >= 9 else 128
    return limits.refusal(
        q,
        v,
        range(8, widest + 1, 8),
        DTYPES,
        segment_ids=segment_ids,
        softcap=softcap,
        second_part_of_the_scores=q_pe,
    )


def attention(
    q, k, v=None, *, causal=True, segment_ids=None, window=None, scale=None, q_pe=None, k_pe=None
) -> jax.Array:
    """As `kernels.dispatch.attention`, whose arguments these are.

    Raises:
      UserError: `refusal` has an answer.
    """
    why = refusal(q, v, causal=causal, segment_ids=segment_ids, window=window, q_pe=q_pe)
    if why:
        raise UserError(f"cudnn takes no such attention: {why}; use impl='auto'")
    return jax.nn.dot_product_attention(
        q,
        k,
        k if v is None else v,
        is_causal=causal,
        scale=scale,
        implementation=BACKEND,
        local_window_size=None if window is None else (window - 1, 0),
    )
