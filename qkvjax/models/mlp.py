"""Feed-forward layers: [B, T, D] -> [B, T, D]."""

from __future__ import annotations

import jax
from flax import nnx

from qkvjax.attention.projection import Linear, named_key
from qkvjax.models.spec import ModelSpec


class MLP(nnx.Module):
    """GELU (two matrices, exact erf) or SwiGLU (three; Shazeer 2020)."""

    def __init__(self, spec: ModelSpec, *, key, std=None, out_std=None):
        make = lambda name, inputs, outputs, std: Linear(  # noqa: E731
            inputs, outputs, key=named_key(key, name), std=std, bias=spec.use_bias
        )
        self.up = make("up", spec.d_model, spec.d_ff, std)
        self.gate = make("gate", spec.d_model, spec.d_ff, std) if spec.mlp == "swiglu" else None
        self.down = make("down", spec.d_ff, spec.d_model, out_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.gate is None:
            return self.down(jax.nn.gelu(self.up(x), approximate=False))
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
