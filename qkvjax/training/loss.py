"""Cross-entropy of next tokens, in nats."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qkvjax.parallel import local, rules


def cross_entropy(logits_BTV, targets_BT, weights_BT) -> tuple[jax.Array, jax.Array]:
    """Weighted negative log-likelihood and log-normaliser squared of each label.

    Args:
      logits_BTV: float32 or wider [B, T, V].
      targets_BT: int [B, T].
      weights_BT: [B, T]; labels of weight 0 are not scored.

    Returns:
      (nats, squares), each [B, T]: -w log p(target), and w log(Z)^2 for the z-loss
      (Chowdhery et al. 2022, section 5).
    """
    log_z = jax.nn.logsumexp(logits_BTV, axis=-1)
    label = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return weights_BT * (log_z - label), weights_BT * log_z**2


# Logits that exist at a time, in numbers: what a core's cache holds on a CPU, and half a GiB of
# float32 on an accelerator, whose products need more rows.
CHUNK = {"cpu": 2**21}
CHUNK_ELSEWHERE, FEWEST_TOKENS = 2**27, 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy(x_BTD, w_DV, targets_BT, weights_BT, z_loss: float = 0.0):
    """`cross_entropy` of the logits x W summed over labels, without ever holding all logits.

    Tokens go chunk by chunk, each through logits, loss and both gradients, so that no [B, T, V]
    exists, neither for the loss nor for its gradient. Only x and W get gradients.

    Args:
      x_BTD: [B, T, D] in the dtype of the products, which are summed in float32 or wider.
      w_DV: [D, V] in the same dtype.
      targets_BT: int [B, T].
      weights_BT: [B, T].
      z_loss: weight of log(Z)^2.

    Returns:
      (sum of w (-log p(target) + z_loss log(Z)^2), sum of w -log p(target)); the second is for
      logging and has no gradient.
    """
    return _forward(x_BTD, w_DV, targets_BT, weights_BT, z_loss)[0]


def _forward(x, w, targets, weights, z_loss):
    one_device = functools.partial(_chunked, z_loss=z_loss)
    dx, totals, dw = local.map_tokens(one_device, w, x, targets, weights)
    return totals, (dx, dw.astype(w.dtype))


def _backward(z_loss, gradients, cotangents):
    scale = cotangents[0]
    dx, dw = ((scale * g).astype(g.dtype) for g in gradients)
    return dx, dw, None, None


linear_cross_entropy.defvjp(_forward, _backward)


def _chunked(columns, w, x, targets, weights, z_loss):
    """dx, (loss, nats) and dw, of the tokens [B, T] and the columns of W on one device."""
    shape, vocab = x.shape, w.shape[1]
    flat = x.reshape(-1, shape[-1]), targets.reshape(-1), weights.reshape(-1)
    tokens = flat[1].size
    limit = CHUNK.get(rules.platform(), CHUNK_ELSEWHERE)
    chunks = -(-tokens // max(FEWEST_TOKENS, limit // vocab))
    size = -(-tokens // chunks)

    def cut(array):  # what fills the last chunk weighs nothing
        filled = jnp.pad(array, [(0, chunks * size - tokens)] + [(0, 0)] * (array.ndim - 1))
        return filled.reshape(chunks, size, *array.shape[1:])

    def add(totals, chunk):
        dx, *new = _chunk(columns, w, *chunk, z_loss)
        return jax.tree.map(jnp.add, totals, tuple(new)), dx

    like = jax.eval_shape(lambda: _chunk(columns, w, *(a[:size] for a in flat), z_loss)[1:])
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    (totals, dw), dx = jax.lax.scan(add, zeros, jax.tree.map(cut, flat), unroll=chunks == 1)
    return dx.reshape(-1, shape[-1])[:tokens].reshape(shape), totals, dw


def _chunk(columns, w, x, targets, weights, z_loss):
    """dx [n, D], (loss, nats) and dw [D, V], of n tokens."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    times = functools.partial(jnp.matmul, preferred_element_type=wide)
    logits = times(x, w)
    top = columns.max(jnp.max(logits, axis=-1, keepdims=True))
    odds = jnp.exp(logits - top)
    normaliser = columns.sum(jnp.sum(odds, axis=-1, keepdims=True))
    log_z = (top + jnp.log(normaliser))[:, 0]
    place = targets - columns.first(w.shape[1])
    label = jnp.take_along_axis(logits, place[:, None], axis=-1, mode="fill", fill_value=0)[:, 0]
    # Of negative places `take` counts from the end.
    label = columns.sum(jnp.where(place < 0, 0, label))
    nats = jnp.sum(weights * (log_z - label))
    loss = nats + z_loss * jnp.sum(weights * log_z**2)
    g = odds * ((weights * (1 + 2 * z_loss * log_z))[:, None] / normaliser)
    here = jnp.arange(w.shape[1]) == place[:, None]
    g = (g - jnp.where(here, weights[:, None], 0)).astype(x.dtype)
    columns_of_x = x.T
    if rules.platform() == "cpu":
        # The barrier writes x^T out first: XLA's CPU is a quarter slower on a product that reads it
        # by columns.
        columns_of_x = jax.lax.optimization_barrier(columns_of_x)
    dw = times(columns_of_x, g)
    return columns.sum(times(g, w.T)).astype(x.dtype), (loss, nats), dw
