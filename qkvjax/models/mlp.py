"""Feed-forward layers: [B, T, D] -> [B, T, D]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from qkvjax.attention.projection import Linear, named_key
from qkvjax.models.spec import ModelSpec


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) with the normal distribution's Phi (Hendrycks & Gimpel 2016), in float32 or wider.

    By erf: `jax.nn.gelu` goes by erfc, which makes a feed-forward layer's gradient a third slower
    on CPU.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


class MLP(nnx.Module):
    """GELU (two matrices) or SwiGLU (three; Shazeer 2020)."""

    def __init__(self, spec: ModelSpec, *, key, std=None, out_std=None):
        make = lambda name, inputs, outputs, std: Linear(  # noqa: E731
            inputs, outputs, key=named_key(key, name), std=std, bias=spec.use_bias
        )
        self.up = make("up", spec.d_model, spec.d_ff, std)
        self.gate = make("gate", spec.d_model, spec.d_ff, std) if spec.mlp == "swiglu" else None
        self.down = make("down", spec.d_ff, spec.d_model, out_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.hidden(x))

    def hidden(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, F], what `down` maps back."""
        if self.gate is None:
            return gelu(self.up(x))
        return jax.nn.silu(self.gate(x)) * self.up(x)
