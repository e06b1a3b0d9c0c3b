"""Positions: rotation of queries and keys, and fixed sine-cosine embeddings."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qkvjax.errors import UserError


def by_row(
    values: Int[Array, "*rows T"], shape: tuple[int, int], name: str = "positions"
) -> Int[Array, "B T"]:
    """Returns values of each token as [B, T]; [T] or [1, T] is the same for every row.

    Args:
      values: integers of shape [B, T], [1, T] or [T].
      shape: (B, T) of the tokens.
      name: of the argument, for the message.

    Raises:
      UserError: any other shape.
    """
    actual = jnp.shape(values)
    if actual == tuple(shape):
        return values
    if actual not in (tuple(shape[1:]), (1, shape[1])):
        raise UserError(
            f"{name} of shape {list(actual)} do not fit tokens of shape {list(shape)}: give [B, T],"
            " or [T] for all rows"
        )
    return jnp.broadcast_to(values, shape)


def rotate(
    x_BTNH: Float[Array, "B T N H"],
    positions_BT: Int[Array, "#B T"],
    *,
    base: float,
    width: int,
    inverse: bool = False,
) -> Float[Array, "B T N H"]:
    """Rotary position embedding (Su et al. 2021, equation 34) of the first `width` numbers.

    Number i is rotated with number i + width/2 by the angle position * base^(-2 i / width): the
    half-split convention of Llama and Qwen checkpoints.

        head    | first half of width | second half of width | rest          |
        result  | a cos - b sin       | b cos + a sin        | not rotated   |

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
    # A narrow dtype cannot even hold the positions.
    wide = jnp.promote_types(x_BTNH.dtype, jnp.float32)
    frequencies = base ** (-jnp.arange(half, dtype=wide) / half)
    angles = positions_BT.astype(wide)[:, :, None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    sin = -sin if inverse else sin
    first, second, rest = jnp.split(x_BTNH, [half, width], axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(part.astype(x_BTNH.dtype) for part in rotated), rest], axis=-1)


def sincos(positions_BT: Int[Array, "B T"], width: int) -> Float[Array, "B T {width}"]:
    """Returns fixed embeddings (Vaswani et al. 2017, section 3.5) in float32.

    Even columns are sines, odd columns cosines, of frequencies 10000^(-2 k / width).
    """
    columns = jnp.arange(width)
    frequencies = 10_000.0 ** (-(columns // 2 * 2) / width)
    angles = positions_BT.astype(jnp.float32)[:, :, None] * frequencies
    return jnp.where(columns % 2 == 0, jnp.sin(angles), jnp.cos(angles))
