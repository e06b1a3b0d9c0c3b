"""Mixture of experts: a router, and E feed-forwards of which each token uses `top`.

Letters: B rows, T tokens of a row, n = B T tokens, D model width, F feed-forward width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from qkvjax.attention.layers import Linear, named_key
from qkvjax.models.feedforward import FeedForwardSpec
from qkvjax.models.mlp import ACTIVATION
from qkvjax.models.spec import ModelSpec
from qkvjax.parallel import experts, local
from qkvjax.parallel.products import matmul


class Experts(nnx.Module):
    """sum over the chosen e of g_e FF_e(x), with g the softmax of the chosen logits (Shazeer et
    al. 2017; over the chosen ones as in Jiang et al. 2024). No token is dropped.

    Args:
      spec: the model's.
      key: a PRNG key.
      std, out_std: standard deviations of the initial values of the maps in (router, up, gate)
        and out (down), as `Linear` takes them.
    """

    def __init__(self, spec: ModelSpec, *, key, std=None, out_std=None):
        self.kind: FeedForwardSpec = spec.feed_forward
        maps = {"up": (spec.d_model, spec.d_ff, std), "down": (spec.d_ff, spec.d_model, out_std)}
        if self.kind.num_matrices == 3:
            maps["gate"] = maps["up"]

        def one_of_each_expert(name):
            inputs, outputs, std = maps[name]
            keys = jax.random.split(named_key(key, name), self.kind.experts)
            return jax.vmap(lambda k: Linear(inputs, outputs, key=k, std=std))(keys)

        self.router = Linear(spec.d_model, self.kind.experts, key=named_key(key, "router"), std=std)
        self.experts = nnx.Dict({name: one_of_each_expert(name) for name in sorted(maps)})

    def __call__(self, x: jax.Array, drop: Callable | None = None):
        """Returns (y [B, T, D], the router's losses and loads as scalars) of x [B, T, D].

        `drop` is not applied. The losses are not weighted yet; a load is the share of all choices
        that one expert gets, times E: 1 where routing is even.
        """
        wide = jnp.promote_types(x.dtype, jnp.float32)
        logits = matmul(x.astype(wide), self.router.weight[...])  # [B, T, E]
        gates = local.on_each_device(self._gates, logits, {})
        # In the dtype in which they are learned: each device narrows its own, so that their
        # gradients cross devices in float32.
        weights = {name: w.weight[...] for name, w in self.experts.items()}
        y = experts.on_experts(self._apply, x, gates, weights, self.kind.top)

        share = jnp.mean(gates > 0, axis=(0, 1), dtype=wide) / self.kind.top  # [E], 1/E when even
        probability = jnp.mean(jax.nn.softmax(logits), axis=(0, 1))  # [E], 1/E when even
        count = self.kind.experts
        return y, {
            "balance": count * jnp.sum(jax.lax.stop_gradient(share) * probability),
            "z_loss": jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2),
            "largest_load": count * jnp.max(share),
            "smallest_load": count * jnp.min(share),
        }

    def _gates(self, logits: jax.Array) -> jax.Array:
        """Returns the softmax over the `top` largest logits, and 0 for the others: [B, T, E].

        Of equal logits the first are chosen.
        """
        chosen = jax.lax.top_k(logits, self.kind.top)[1]
        is_chosen = jnp.any(jax.nn.one_hot(chosen, logits.shape[-1], dtype=bool), axis=-2)
        return jax.nn.softmax(jnp.where(is_chosen, logits, -jnp.inf))

    def _apply(self, first, x, gates, weights: dict[str, jax.Array]) -> jax.Array:
        """Returns what the experts first, first + 1, ... of `weights` add to x, [B, T, D].

        Each token has `top` choices, a row each. The rows are sorted by expert, because
        `ragged_dot` multiplies consecutive groups of rows by one matrix each:

            choices        a0 a1 b0 b1 c0 c1        token and number of the choice
            expert          2  0  1  0  -  2        -: an expert of another device
            sorted         a1 b1 | b0 | a0 c1 | c0
            group             0  |  1 |   2   | none

        Args:
          x: [B, T, D].
          gates: [B, T, E]; of tokens from another device, zero for experts that are not here.
          weights: matrices [experts here, inputs, outputs].
        """
        shape = x.shape
        top = self.kind.top
        num_here = weights["up"].shape[0]
        x = x.reshape(-1, shape[-1])
        gate, expert = jax.lax.top_k(gates.reshape(-1, gates.shape[-1]), top)  # [n, top]
        index = expert - first
        # A token from another device may have fewer than `top` gates here; a gate of 0 is not a
        # choice.
        is_here = (index >= 0) & (index < num_here) & (gate > 0)
        group = jnp.where(is_here, index, num_here).reshape(-1)  # [n top]; other devices' last
        order = jnp.argsort(group)
        sizes = jnp.bincount(group, length=num_here + 1)[:num_here].astype(jnp.int32)
        wide = jnp.promote_types(x.dtype, jnp.float32)

        def times(rows, name):
            matrix = weights[name].astype(x.dtype)
            product = jax.lax.ragged_dot(rows, matrix, sizes, preferred_element_type=wide)
            return product.astype(x.dtype)

        # What ragged_dot returns for rows in no group is not defined, and neither is their
        # gradient: both ends are set to zero.
        rows = jnp.where(is_here.reshape(-1, 1)[order], x[order // top], 0)
        act = ACTIVATION[self.kind.activation]
        hidden = times(rows, "up")
        hidden = act(times(rows, "gate")) * hidden if "gate" in weights else act(hidden)
        back = jnp.argsort(order)  # from sorted rows to choices
        y = times(hidden, "down")[back].reshape(-1, top, shape[-1])
        y = jnp.where(is_here[..., None], y, 0)
        return jnp.einsum("nkd,nk->nd", y, gate.astype(x.dtype)).reshape(shape)
