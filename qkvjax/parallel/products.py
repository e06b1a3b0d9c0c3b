"""The product of tokens and a parameter, with a gradient that suits a parameter.

Letters: B sequences, T tokens of each, D inputs, F outputs.

What devices send each other, for bfloat16 tokens x and a float32 parameter w [D, F] on two devices
of "fsdp", each with tokens of its own:

                    device 0                  device 1
    stored          w[:D/2]  float32          w[D/2:]  float32
                    cast to bfloat16          cast to bfloat16
                        +------- gather, bfloat16 -------+
    forward         x0 @ w -> y0              x1 @ w -> y1
    backward        g0 @ w^T -> dx0           g1 @ w^T -> dx1
                    x0^T g0  float32          x1^T g1  float32
                        +--- sum over devices, float32 --+
    gradient        dw[:D/2]                  dw[D/2:]

Casting before gathering halves what is sent. Summing in float32 keeps the small contributions of
many tokens, which bfloat16 would round away.

And over "tensor", where both devices have the same tokens:

    columns of w are sharded    y: each device computes some columns of y     dx: summed
    rows of w are sharded       y: each device has a part of the sum; summed  dx: nothing is sent
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qkvjax.parallel.rules import axes_of, gather, has_mesh, place_like, platform


def matmul(x_BTD: jax.Array, w_DF: jax.Array, dtype=None) -> jax.Array:
    """Returns [B, T, D] @ [D, F] -> [B, T, F], computed in the dtype of x.

    The parameter w may be wider than x. Its gradient is summed over tokens in the dtype of w, on a
    device and across devices: in float32 for float32 parameters, whatever x is. The result is
    sharded as the columns of w are; rows that are sharded are summed over.

    Args:
      dtype: of the result; None means that of x.
    """
    return _matmul(x_BTD, w_DF, jnp.dtype(x_BTD.dtype if dtype is None else dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, w, dtype):
    return _product(x, gather(w.astype(x.dtype)), dtype)


def _forward(x, w, dtype):
    return _matmul(x, w, dtype), (x, w)


def _backward(dtype, arrays, g):
    x, w = arrays
    g = g.astype(x.dtype)
    # Gathered again rather than kept: kept, the whole model would wait for its backward pass.
    narrow_w = gather(w.astype(x.dtype))
    dx = _product(g, narrow_w.T, x.dtype)
    return place_like(dx, x), _weight_gradient(x, g, w)


_matmul.defvjp(_forward, _backward)


def _product(x, w, dtype):
    """Returns [B, T, D] @ [D, F] of a gathered w, in `dtype`.

    Tokens are flattened to one axis first: XLA's CPU takes a slow path for weight gradients that
    contract over two axes (1.5 times the step of a small model). Where positions are sharded the
    reshape would move data, so there the two axes stay.
    """
    batch, length, width = x.shape
    if not has_mesh():
        flat = jnp.matmul(x.reshape(-1, width), w, preferred_element_type=dtype)
        return flat.reshape(batch, length, -1)

    w_rows, w_columns = axes_of(w)
    sequences, positions, _ = axes_of(x)
    result = PartitionSpec(sequences, positions, w_columns)
    if positions is not None:
        return jnp.einsum("btd,df->btf", x, w, out_sharding=result, preferred_element_type=dtype)
    flat = jnp.matmul(
        _flat(x, w_rows),
        w,
        out_sharding=PartitionSpec(sequences, w_columns),
        preferred_element_type=dtype,
    )
    return jax.lax.reshape(flat, (batch, length, w.shape[1]), out_sharding=result)


def _flat(x, column_axes):
    """Reshapes [B, T, D] to [B T, D], where positions are not sharded; columns over these axes."""
    shape = (x.shape[0] * x.shape[1], x.shape[2])
    if not has_mesh():
        return x.reshape(shape)
    sequences, _, _ = axes_of(x)
    return jax.lax.reshape(x, shape, out_sharding=PartitionSpec(sequences, column_axes))


def _weight_gradient(x, g, w):
    """Returns the sum over tokens of x g^T, [D, F], in the dtype of w and sharded as w is."""
    if not has_mesh():
        return _outer(_flat(x, None), _flat(g, None), w.dtype)

    w_rows, w_columns = axes_of(gather(w))
    gathered = PartitionSpec(w_rows, w_columns)
    _, positions, _ = axes_of(x)
    if positions is not None:
        dw = jnp.einsum("btd,btf->df", x, g, out_sharding=gathered, preferred_element_type=w.dtype)
    else:
        dw = _outer(_flat(x, w_rows), _flat(g, w_columns), w.dtype, out_sharding=gathered)
    return place_like(dw, w)


def _outer(x, g, dtype, out_sharding=None):
    """Returns x^T g of [n, D] and [n, F]: [D, F]."""
    if platform() == "cpu" and x.shape[1] > g.shape[1]:
        # XLA's CPU multiplies [F, n] by [n, D] 1.8 times as fast as the transposes when F < D (one
        # core, 768 tokens, 128 by 512). The barriers keep it from seeing that the two are one.
        if out_sharding is not None:
            out_sharding = PartitionSpec(*reversed(out_sharding))
        transposed = jnp.matmul(g.T, x, preferred_element_type=dtype, out_sharding=out_sharding)
        transposed = jax.lax.optimization_barrier(transposed)
        return jax.lax.optimization_barrier(transposed.T)
    return jnp.matmul(x.T, g, preferred_element_type=dtype, out_sharding=out_sharding)
