"""Mixture of experts: a router and E feed-forwards, of which each token meets a few."""

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
    al. 2017; over the chosen ones as in Jiang et al. 2024). No token is dropped."""

    def __init__(self, spec: ModelSpec, *, key, std=None, out_std=None):
        self.kind: FeedForwardSpec = spec.feed_forward
        wide = {"up": (spec.d_model, spec.d_ff, std), "down": (spec.d_ff, spec.d_model, out_std)}
        if self.kind.num_matrices == 3:
            wide["gate"] = wide["up"]

        def stacked(name):
            inputs, outputs, std = wide[name]
            keys = jax.random.split(named_key(key, name), self.kind.experts)
            return jax.vmap(lambda k: Linear(inputs, outputs, key=k, std=std))(keys)

        self.router = Linear(spec.d_model, self.kind.experts, key=named_key(key, "router"), std=std)
        self.experts = nnx.Dict({name: stacked(name) for name in sorted(wide)})

    def __call__(self, x: jax.Array, drop: Callable | None = None):
        """(y, losses and loads of the router as scalars), of [B, T, D]."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        logits = matmul(x.astype(wide), self.router.weight[...])
        gates = local.on_each_device(self._choose, logits, {})
        # As they are learned: narrowed on each device, their gradients cross devices in float32.
        weights = {name: w.weight[...] for name, w in self.experts.items()}
        y = experts.on_experts(self._apply, x, gates, weights, self.kind.top)
        # The share of tokens that meet an expert, and the mean probability: 1/E when even.
        share = jnp.mean(gates > 0, axis=(0, 1), dtype=wide) / self.kind.top
        probability = jnp.mean(jax.nn.softmax(logits), axis=(0, 1))
        count = self.kind.experts
        return y, {
            "balance": count * jnp.sum(jax.lax.stop_gradient(share) * probability),
            "z_loss": jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2),
            "largest_load": count * jnp.max(share),
            "smallest_load": count * jnp.min(share),
        }

    def _choose(self, logits: jax.Array) -> jax.Array:
        """Softmax over the `top` largest logits, the first of equal ones, else 0: [B, T, E]."""
        chosen = jax.lax.top_k(logits, self.kind.top)[1]
        kept = jnp.any(jax.nn.one_hot(chosen, logits.shape[-1], dtype=bool), axis=-2)
        return jax.nn.softmax(jnp.where(kept, logits, -jnp.inf))

    def _apply(self, first, x, gates, weights: dict[str, jax.Array]) -> jax.Array:
        """What the experts first, first + 1, ... of `weights` add to tokens [B, T, D]."""
        shape, top = x.shape, self.kind.top
        here = weights["up"].shape[0]
        x, gates = x.reshape(-1, shape[-1]), gates.reshape(-1, gates.shape[-1])
        gate, chosen = jax.lax.top_k(gates, top)  # [tokens, top]
        place = chosen - first
        # Of a token that came from another device, the gates of other devices' experts are 0.
        mine = (place >= 0) & (place < here) & (gate > 0)
        group = jnp.where(mine, place, here).reshape(-1)  # other devices' come last
        order = jnp.argsort(group)
        sizes = jnp.bincount(group, length=here + 1)[:here].astype(jnp.int32)
        wide = jnp.promote_types(x.dtype, jnp.float32)

        def times(rows, name):
            matrix = weights[name].astype(x.dtype)
            product = jax.lax.ragged_dot(rows, matrix, sizes, preferred_element_type=wide)
            return product.astype(x.dtype)

        mine = mine[..., None]
        # What ragged_dot makes of rows in no group is its own affair, and so is their gradient.
        rows = jnp.where(mine.reshape(-1, 1)[order], x[order // top], 0)
        act, hidden = ACTIVATION[self.kind.activation], times(rows, "up")
        hidden = act(times(rows, "gate")) * hidden if "gate" in weights else act(hidden)
        y = times(hidden, "down")[jnp.argsort(order)].reshape(-1, top, shape[-1])
        y = jnp.where(mine, y, 0)
        return jnp.einsum("nkd,nk->nd", y, gate.astype(x.dtype)).reshape(shape)
