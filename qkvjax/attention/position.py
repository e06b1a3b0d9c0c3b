"""Positions: rotation of queries and keys, and fixed sine-cosine embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qkvjax.errors import UserError


def by_row(values: jax.Array, shape: tuple[int, int], name: str = "positions") -> jax.Array:
    """Returns values of each token as [B, T]; [T] or [1, T] is the same for every row.

    Args:
      values: integers of shape [B, T], [1, T] or [T].
      shape: (B, T) of the tokens.
      name: of the argument, for the message.

    Raises:
      UserError: any other shape.
    """
    found = jnp.shape(values)
    if found == tuple(shape):
        return values
    if found not in (tuple(shape[1:]), (1, shape[1])):
        raise UserError(
            f"{name} of shape {list(found)} do not fit tokens of shape {list(shape)}: give [B, T],"
            " or [T] for all rows"
        )
    return jnp.broadcast_to(values, shape)


def rotate(
    x_BTNH: jax.Array,
    positions_BT: jax.Array,
    *,
    base: float,
    width: int,
    inverse: bool = False,
) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, equation 34) of the first `width` numbers.

    Number i turns with number i + width/2 by the angle position * base^(-2 i / width): the
    half-split convention of Llama and Qwen checkpoints.

    Args:
      x_BTNH: [B, T, N, H] heads.
      positions_BT: int [B, T].
      base: of the frequencies.
      width: even, at most H; the rest of the head passes unchanged.
      inverse: rotate back.

    Returns:
      [B, T, N, H] in the dtype of x, computed in float32 or wider.
    """
    half = width // 2
    wide = jnp.promote_types(x_BTNH.dtype, jnp.float32)
    frequencies = base ** (-jnp.arange(half, dtype=wide) / half)
    angles = positions_BT.astype(wide)[:, :, None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    sin = -sin if inverse else sin
    first, second, rest = jnp.split(x_BTNH, [half, width], axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(part.astype(x_BTNH.dtype) for part in turned), rest], axis=-1)


def sincos(positions_BT: jax.Array, width: int) -> jax.Array:
    """Fixed embeddings (Vaswani et al. 2017, section 3.5): int [B, T] -> float32 [B, T, width].

    Even columns are sines, odd columns cosines, of frequencies 10000^(-2 k / width).
    """
    columns = jnp.arange(width)
    frequencies = 10_000.0 ** (-(columns // 2 * 2) / width)
    angles = positions_BT.astype(jnp.float32)[:, :, None] * frequencies
    return jnp.where(columns % 2 == 0, jnp.sin(angles), jnp.cos(angles))
