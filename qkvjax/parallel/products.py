"""The product of tokens and a parameter, with the gradient that a parameter wants.

Letters: B sequences, T tokens of each, D inputs, F outputs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qkvjax.parallel.rules import axes_of, gather, has_mesh, place_like, platform


def matmul(x_BTD: jax.Array, w_DF: jax.Array, dtype=None) -> jax.Array:
    """[B, T, D] @ [D, F] -> [B, T, F], computed in the dtype of x.

    The parameter w may be wider than x. It is narrowed before it is gathered over the axes of
    "embed", as FSDP does just before use. Its gradient is summed over tokens in the dtype of w,
    on a device and across devices: float32 for float32 parameters, whatever x is.

    The result is spread over devices as the columns of w are; rows that are spread are summed
    over.

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
    narrow = gather(w.astype(x.dtype))
    dx = _product(g, narrow.T, x.dtype)
    return place_like(dx, x), _weight_gradient(x, g, w)


_matmul.defvjp(_forward, _backward)


def _product(x, w, dtype):
    """[B, T, D] @ [D, F] of a gathered w, in `dtype`.

    Tokens are flattened to one axis first: XLA's CPU takes a slow path for weight gradients that
    contract over two axes (1.5 times the step of a small model). Where sequences are sharded the
    reshape would move data, so it is left alone.
    """
    batch, length, width = x.shape
    if not has_mesh():
        flat = jnp.matmul(x.reshape(-1, width), w, preferred_element_type=dtype)
        return flat.reshape(batch, length, -1)
    rows, columns = axes_of(w)
    sequences, tokens, _ = axes_of(x)
    result = PartitionSpec(sequences, tokens, columns)
    if tokens is not None:
        whole = {"out_sharding": result, "preferred_element_type": dtype}
        return jnp.einsum("btd,df->btf", x, w, **whole)
    after = PartitionSpec(sequences, columns)
    flat = jnp.matmul(_flat(x, rows), w, out_sharding=after, preferred_element_type=dtype)
    return jax.lax.reshape(flat, (batch, length, w.shape[1]), out_sharding=result)


def _flat(x, columns):
    """[B, T, D] -> [B T, D], where no sequence is sharded."""
    shape = (x.shape[0] * x.shape[1], x.shape[2])
    if not has_mesh():
        return x.reshape(shape)
    sequences, _, _ = axes_of(x)
    return jax.lax.reshape(x, shape, out_sharding=PartitionSpec(sequences, columns))


def _weight_gradient(x, g, w):
    """sum over tokens of x g^T, [D, F], in the dtype of w and spread as w is."""
    if not has_mesh():
        return _outer(_flat(x, None), _flat(g, None), w.dtype)
    rows, columns = axes_of(gather(w))
    gathered = PartitionSpec(rows, columns)
    if axes_of(x)[1] is not None:
        whole = {"out_sharding": gathered, "preferred_element_type": w.dtype}
        dw = jnp.einsum("btd,btf->df", x, g, **whole)
    else:
        dw = _outer(_flat(x, rows), _flat(g, columns), w.dtype, out_sharding=gathered)
    return place_like(dw, w)


def _outer(x, g, dtype, out_sharding=None):
    """x^T g of [n, D] and [n, F]: [D, F]."""
    options = {"preferred_element_type": dtype, "out_sharding": out_sharding}
    if platform() == "cpu" and x.shape[1] > g.shape[1]:
        # XLA's CPU multiplies [F, n] by [n, D] 1.8 times as fast as the transposes when F < D (one
        # core, 768 tokens, 128 by 512). The barriers keep it from seeing that the two are one.
        if out_sharding is not None:
            options["out_sharding"] = PartitionSpec(*reversed(out_sharding))
        hidden = jax.lax.optimization_barrier(jnp.matmul(g.T, x, **options))
        return jax.lax.optimization_barrier(hidden.T)
    return jnp.matmul(x.T, g, **options)
