"""Feed-forward layers: [B, T, D] -> [B, T, D]."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from qkvjax.attention.layers import Linear, named_key, wide_add
from qkvjax.models.spec import ModelSpec
from qkvjax.parallel.products import matmul


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) with the normal distribution's Phi (Hendrycks & Gimpel 2016), in float32 or wider.

    By erf: `jax.nn.gelu` goes by erfc, which makes a feed-forward layer's gradient a third slower
    on CPU.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


# What stands between the maps up and down; of swiglu, what gates the map up.
ACTIVATION = {"gelu": gelu, "relu2": lambda x: jax.nn.relu(x) ** 2, "swiglu": jax.nn.silu}


class MLP(nnx.Module):
    """One feed-forward of all tokens, as `spec.feed_forward` says.

    Where up and down are tied the map down is the map up transposed, times what gives its output
    the scale it has with a matrix of its own.
    """

    def __init__(self, spec: ModelSpec, *, key, std=None, out_std=None):
        make = lambda name, inputs, outputs, std: Linear(  # noqa: E731
            inputs, outputs, key=named_key(key, name), std=std, bias=spec.use_bias
        )
        kind = spec.feed_forward
        self.activation = kind.activation
        self.up = make("up", spec.d_model, spec.d_ff, std)
        self.gate = make("gate", spec.d_model, spec.d_ff, std) if kind.num_matrices == 3 else None
        self.down = None if kind.tied else make("down", spec.d_ff, spec.d_model, out_std)
        self.bias = nnx.Param(jnp.zeros(spec.d_model)) if kind.tied and spec.use_bias else None
        drawn = [(spec.d_model, std), (spec.d_ff, out_std)]
        ups, downs = (n**-0.5 if isinstance(s, str | None) else s for n, s in drawn)
        self.scale = downs / ups

    def __call__(self, x: jax.Array, drop: Callable = lambda hidden: hidden):
        """(y, None); `drop` is applied between the maps."""
        hidden = self.up(x)
        act = ACTIVATION[self.activation]
        hidden = act(hidden) if self.gate is None else act(self.gate(x)) * hidden
        hidden = drop(hidden)
        if self.down is not None:
            return self.down(hidden), None
        y = matmul(hidden, self.up.weight[...].T) * self.scale
        y = y.astype(x.dtype)
        return (y if self.bias is None else wide_add(y, self.bias[...])), None
