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
    """Returns x Phi(x) with the normal distribution's Phi (Hendrycks & Gimpel 2016).

    Computed in float32 or wider, by erf. `jax.nn.gelu` uses erfc, which makes a feed-forward
    layer's gradient a third slower on CPU.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def squared_relu(x: jax.Array) -> jax.Array:
    """Returns max(x, 0)^2 (So et al. 2021)."""
    return jax.nn.relu(x) ** 2


# The function between the maps up and down; of swiglu, the function of the gate.
ACTIVATION = {"gelu": gelu, "relu2": squared_relu, "swiglu": jax.nn.silu}


class MLP(nnx.Module):
    """One feed-forward for all tokens, as `spec.feed_forward` says.

    down(act(up(x))), or down(act(gate(x)) * up(x)) for swiglu. With "up=down" the map down is the
    map up transposed, times a constant `scale`: the output then has the scale that a separate
    matrix would give it.

    Args:
      spec: the model's.
      key: a PRNG key.
      std, out_std: standard deviations of the initial values of the maps in (up, gate) and out
        (down), as `Linear` takes them.
    """

    def __init__(self, spec: ModelSpec, *, key, std=None, out_std=None):
        def linear(name, inputs, outputs, std):
            return Linear(inputs, outputs, key=named_key(key, name), std=std, bias=spec.use_bias)

        kind = spec.feed_forward
        self.activation = kind.activation
        self.up = linear("up", spec.d_model, spec.d_ff, std)
        # Each attribute is assigned once: nnx takes a None as static, and refuses a module later.
        has_gate = kind.num_matrices == 3
        has_own_bias = kind.tied and spec.use_bias  # else the map down has it
        self.gate = linear("gate", spec.d_model, spec.d_ff, std) if has_gate else None
        self.down = None if kind.tied else linear("down", spec.d_ff, spec.d_model, out_std)
        self.bias = nnx.Param(jnp.zeros(spec.d_model)) if has_own_bias else None
        self.scale = _std_of(out_std, spec.d_ff) / _std_of(std, spec.d_model)

    def __call__(self, x: jax.Array, drop: Callable = lambda hidden: hidden):
        """Returns (y, None): [B, T, D], and no losses of a router.

        Args:
          drop: is applied to the hidden activations, [B, T, F].
        """
        act = ACTIVATION[self.activation]
        hidden = self.up(x)
        hidden = act(hidden) if self.gate is None else act(self.gate(x)) * hidden
        hidden = drop(hidden)
        if self.down is not None:
            return self.down(hidden), None
        y = matmul(hidden, self.up.weight[...].T) * self.scale
        y = y.astype(x.dtype)
        if self.bias is not None:
            y = wide_add(y, self.bias[...])
        return y, None


def _std_of(std: float | str | None, inputs: int) -> float:
    """Returns `std` as a number.

    None and "uniform" count as 1/sqrt(inputs): the two that are divided differ by the same factor
    for "uniform".
    """
    return inputs**-0.5 if std is None or std == "uniform" else std
