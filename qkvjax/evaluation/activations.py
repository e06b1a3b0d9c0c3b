"""What each attention layer of a model computes for a batch, for `evaluation.inside` to measure.

The kernels of attention return neither scores nor weights, so they are computed here a second time,
in the plain way: [T, T] numbers for each head.

Letters: B sequences, T tokens, D model width, N query heads, K key-value heads, G = N / K, H head
width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class LayerActivations(NamedTuple):
    """What one attention layer computes for a batch, float32 on the host.

    Attributes:
      states: block of roles such as "kv" -> the projection's output [B, T, heads, H].
      scores: [B, N, T, T], everything that softmax sees, before the mask.
      weights: [B, N, T, T], attention.
    """

    states: dict[str, np.ndarray]
    scores: np.ndarray
    weights: np.ndarray


def layer_activations(model, inputs) -> list[LayerActivations]:
    """Runs whole sequences through a model and returns what each layer computed.

    Args:
      model: any model of `qkvjax.models`.
      inputs: int [B, T], or as the model takes them.
    """
    x, positions = embedded(model, inputs)
    results = []
    for block in model.stack.layers():
        x, activations = run_block(block, x, positions)
        results.append(activations)
    return results


def embedded(model, inputs) -> tuple[jax.Array, jax.Array]:
    """Returns (what the first block reads, positions int [B, T]) of whole sequences."""
    length = inputs.shape[1] + (model.spec.kind == "vit")
    positions = jnp.broadcast_to(jnp.arange(length), (len(inputs), length))
    return model.embed(jnp.asarray(inputs), positions), positions


def run_block(block, x, positions) -> tuple[jax.Array, LayerActivations]:
    """Returns (the next x, what the block's attention computed)."""
    x, activations = _run_block(block, x, positions)
    return x, LayerActivations(*jax.device_get(activations))


@jax.jit
def _run_block(block, x, positions):
    """Returns the next x, and (states, scores, weights) of the block's attention."""
    layer = block.attention
    y = block.attention_norm(x)
    scores = _scores(layer, y, positions)
    weights = jax.nn.softmax(jnp.where(_mask(layer.spec, x.shape[1]), scores, -jnp.inf))
    next_x, _ = block(x, positions)
    return next_x, (_states(layer, y), scores, weights)


def _states(layer, y) -> dict[str, jax.Array]:
    """Returns the output of each projection by its block of roles, [B, T, heads, H]."""
    heads = {"".join(block): layer.spec.num_role_heads(block[0]) for block in layer.spec.blocks}
    return {
        name: project(y).reshape(*y.shape[:2], heads[name], -1)
        for name, project in layer.projections.items()
    }


def _scores(layer, y, positions) -> jax.Array:
    """Returns what softmax sees before the mask, [B, N, T, T]."""
    q, entry = layer.project(y, positions)
    k, _ = layer.expand(entry, positions)
    # A score modifier that adds a term for each key is a product of extra columns.
    extra = layer.columns(q, positions)
    if extra:
        q = jnp.concatenate([q, extra["q_pe"]], -1)
        k = jnp.concatenate([k, extra["k_pe"]], -1)
    q_BTKGH = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k) / layer.spec.head_dim**0.5
    return scores.reshape(scores.shape[0], -1, *scores.shape[3:])


def _mask(spec, length: int) -> jax.Array:
    """Returns which keys a query sees, bool [T, T]."""
    index = jnp.arange(length)
    distance = index[:, None] - index[None]
    mask = jnp.ones_like(distance, bool)
    if spec.causal:
        mask &= distance >= 0
    if spec.window is not None:
        mask &= abs(distance) < spec.window
    return mask
