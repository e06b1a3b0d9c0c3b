"""Learned maps: linear projections and norms, with initial values that names decide.

They apply to the last axis of an array; `*lead` are the axes before it.
"""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qkvjax.kernels.stored import NORM_EPSILON
from qkvjax.parallel.products import matmul


def named_key(key: jax.Array, name: str) -> jax.Array:
    """Returns a key for one parameter, so that models of different sharing start alike.

    The draw depends on the name and not on what was drawn before: with one seed the W_q, the
    feed-forward and the embedding of every variant are the same numbers.
    """
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


class Linear(nnx.Module):
    """x W + b for the last axis: [B, T, in] -> [B, T, out], computed in the dtype of x.

    Args:
      std: standard deviation of the initial normal values; None means 1/sqrt(in); "uniform"
        draws weights and bias from U(-1/sqrt(in), 1/sqrt(in)), as torch.nn.Linear does.
    """

    def __init__(self, inputs: int, outputs: int, *, key, std=None, bias: bool = False):
        if std == "uniform":
            weight = inputs**-0.5 * jax.random.uniform(key, (inputs, outputs), minval=-1)
            shift = inputs**-0.5 * jax.random.uniform(named_key(key, "bias"), outputs, minval=-1)
        else:
            std = inputs**-0.5 if std is None else std
            weight = std * jax.random.normal(key, (inputs, outputs))
            shift = jnp.zeros(outputs)
        self.weight = nnx.Param(weight)
        self.bias = nnx.Param(shift) if bias else None

    def __call__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        y = matmul(x, self.weight[...])
        return y if self.bias is None else wide_add(y, self.bias[...])


def wide_add(x: Float[Array, "*lead H"], parameter: Float[Array, ...]) -> Float[Array, "*lead H"]:
    """Returns x + parameter in the dtype of x, added in float32 or wider.

    So is the parameter's gradient, which sums over tokens.
    """
    return (x + parameter.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


def wide_times(x: Float[Array, "*lead H"], parameter: Float[Array, ...]) -> Float[Array, "*lead H"]:
    """Returns x * parameter in the dtype of x, computed in float32 or wider, as `wide_add` adds."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) * parameter.astype(wide)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * gain over the last axis (Zhang & Sennrich 2019), in float32."""

    def __init__(self, width: int):
        self.gain = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*lead H"]) -> Float[Array, "*lead H"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + NORM_EPSILON)
        return (wide * scale * self.gain[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * gain + bias over the last axis (Ba et al. 2016), eps 1e-5, in float32."""

    def __init__(self, width: int, *, bias: bool):
        self.gain = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width)) if bias else None

    def __call__(self, x: Float[Array, "*lead H"]) -> Float[Array, "*lead H"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
        y = centred * scale * self.gain[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)
