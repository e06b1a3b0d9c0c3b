"""NVIDIA's fused attention, from a library that jax calls.

It knows two tensors: with K = V it loads the one twice and adds two gradients.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from qkvjax.errors import UserError
from qkvjax.kernels import limits
from qkvjax.parallel.target import target

BACKEND = "cudnn"
DTYPES = ("bfloat16", "float16")


def refusal(q, v=None, *, causal=True, segment_ids=None, window=None, q_pe=None) -> str | None:
    """Returns why it does not support these arguments; None where it does.

    The library would ignore some of them silently.
    """
    if window is not None and not causal:
        return "a window must only look back (causal=True)"
    # jax allows the widths of the device that is here, whatever it compiles for.
    device = target()
    widest = 256 if device.here and device.major >= 9 else 128
    unsupported = {"segments": segment_ids, "a second part of the scores": q_pe}
    return limits.refusal(q, v, range(8, widest + 1, 8), DTYPES, unsupported)


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
) -> Float[Array, "B T N _"]:
    """Computes `kernels.dispatch.attention`, whose arguments these are.

    Raises:
      UserError: for the reason that `refusal` returns.
    """
    reason = refusal(q, v, causal=causal, segment_ids=segment_ids, window=window, q_pe=q_pe)
    if reason:
        raise UserError(f"cudnn does not support these arguments: {reason}; use impl='auto'")
    return jax.nn.dot_product_attention(
        q,
        k,
        k if v is None else v,
        is_causal=causal,
        scale=scale,
        implementation=BACKEND,
        local_window_size=None if window is None else (window - 1, 0),
    )
