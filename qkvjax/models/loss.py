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
    exists, neither for the loss nor for its gradient. Only x and W get gradients; that of W is
    summed over tokens, and across devices, in the dtype of W.

    Args:
      x_BTD: [B, T, D] in the dtype of the products, which are summed in float32 or wider.
      w_DV: [D, V] as it is learned, or `tables.copies` of it.
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
    dx, totals, dw = local.map_tokens(one_device, w.astype(x.dtype), x, targets, weights)
    return totals, (dx, rules.place_like(dw.astype(w.dtype), w))


def _backward(z_loss, gradients, cotangents):
    scale = cotangents[0]
    dx, dw = ((scale * g).astype(g.dtype) for g in gradients)
    return dx, dw, None, None


linear_cross_entropy.defvjp(_forward, _backward)


def label_scores(x_BTD, w_DV, targets_BT, weights_BT) -> tuple[jax.Array, jax.Array]:
    """Scores each label by the logits x W, without ever holding all logits and without gradients.

    Args: as in `linear_cross_entropy`.

    Returns:
      (-w log p(target), float32 or wider [B, T]; whether the target is the likeliest of the
      vocabulary, bool [B, T]: of equal logits the first counts).
    """
    arrays = x_BTD, targets_BT, weights_BT
    return local.map_tokens(_scored, w_DV.astype(x_BTD.dtype), *arrays, sums=False)


def _scored(columns, w, x, targets, weights):
    """(nats, right) of the tokens [B, T] and the columns of W on one device."""
    chunked, joined = _chunks(w.shape[1], x, targets, weights)

    def score(_, chunk):
        logits, top, normaliser, label = _logits(columns, w, *chunk[:2])
        log_z = top[:, 0] + jnp.log(normaliser[:, 0])
        first = columns.first(w.shape[1]) + jnp.argmax(logits, axis=-1)
        is_top = jnp.max(logits, axis=-1) == top[:, 0]
        likeliest = columns.min(jnp.where(is_top, first, jnp.iinfo(jnp.int32).max))
        return None, (chunk[2] * (log_z - label), likeliest == chunk[1])

    _, scores = jax.lax.scan(score, None, chunked, unroll=chunked[1].shape[0] == 1)
    return jax.tree.map(joined, scores)


def _chunks(vocab: int, *by_token):
    """Cuts arrays [B, T, ...] of tokens into chunks [chunks, size, ...] whose logits over `vocab`
    columns fit, and gives the function that joins such arrays again."""
    shape = by_token[1].shape
    tokens = by_token[1].size
    limit = CHUNK.get(rules.platform(), CHUNK_ELSEWHERE)
    chunks = -(-tokens // max(FEWEST_TOKENS, limit // vocab))
    size = -(-tokens // chunks)

    def cut(array):  # what fills the last chunk weighs nothing
        flat = array.reshape(tokens, *array.shape[2:])
        filled = jnp.pad(flat, [(0, chunks * size - tokens)] + [(0, 0)] * (flat.ndim - 1))
        return filled.reshape(chunks, size, *flat.shape[1:])

    def joined(array):
        flat = array.reshape(-1, *array.shape[2:])
        return flat[:tokens].reshape(*shape, *array.shape[2:])

    return tuple(cut(array) for array in by_token), joined


def _chunked(columns, w, x, targets, weights, z_loss):
    """dx, (loss, nats) and dw, of the tokens [B, T] and the columns of W on one device."""
    chunked, joined = _chunks(w.shape[1], x, targets, weights)

    def add(totals, chunk):
        dx, *new = _chunk(columns, w, *chunk, z_loss)
        return jax.tree.map(jnp.add, totals, tuple(new)), dx

    like = jax.eval_shape(lambda: _chunk(columns, w, *(a[0] for a in chunked), z_loss)[1:])
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    (totals, dw), dx = jax.lax.scan(add, zeros, chunked, unroll=chunked[1].shape[0] == 1)
    return joined(dx), totals, dw


def _logits(columns, w, x, targets):
    """The logits [n, V] of this device's columns of W; and of all columns the largest [n, 1], the
    sum of exp(logit - largest) [n, 1] and the target's logit [n]."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.matmul(x, w, preferred_element_type=wide)
    top = columns.max(jnp.max(logits, axis=-1, keepdims=True))
    normaliser = columns.sum(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))
    place = targets - columns.first(w.shape[1])
    label = jnp.take_along_axis(logits, place[:, None], axis=-1, mode="fill", fill_value=0)[:, 0]
    # Of negative places `take` counts from the end.
    return logits, top, normaliser, columns.sum(jnp.where(place < 0, 0, label))


def _chunk(columns, w, x, targets, weights, z_loss):
    """dx [n, D], (loss, nats) and dw [D, V], of n tokens."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits, top, normaliser, label = _logits(columns, w, x, targets)
    log_z = (top + jnp.log(normaliser))[:, 0]
    nats = jnp.sum(weights * (log_z - label))
    loss = nats + z_loss * jnp.sum(weights * log_z**2)
    g = jnp.exp(logits - top) * ((weights * (1 + 2 * z_loss * log_z))[:, None] / normaliser)
    here = columns.first(w.shape[1]) + jnp.arange(w.shape[1]) == targets[:, None]
    g = (g - jnp.where(here, weights[:, None], 0)).astype(x.dtype)
    columns_first = x.T
    if rules.platform() == "cpu":
        # The barrier writes x^T out first: XLA's CPU is a quarter slower on a product that reads
        # it by columns.
        columns_first = jax.lax.optimization_barrier(columns_first)
    dw = jnp.matmul(columns_first, g, preferred_element_type=wide)
    dx = columns.sum(jnp.matmul(g, w.T, preferred_element_type=wide))
    return dx.astype(x.dtype), (loss, nats), dw
