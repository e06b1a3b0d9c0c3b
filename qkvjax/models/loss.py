"""Cross-entropy of next tokens, in nats.

The logits of a batch are one large array: 16,384 tokens and 50,304 ids take 3.3 GB in float32, and
their gradient takes as much again. `linear_cross_entropy` never holds them. It cuts the tokens into
chunks of n, and goes through the chunks in a scan:

    x [B, T, D]            for one chunk, with all of W [D, V]          result
    +---------+
    | chunk 0 |
    +---------+            logits  = x W         [n, V]
    | chunk 1 |  ------->  loss, nats                          ----->   added to the totals
    +---------+            dlogits = dloss/dlogits  [n, V]
    |   ...   |            dx      = dlogits W^T [n, D]        ----->   these rows of dx [B, T, D]
    +---------+            dW      = x^T dlogits [D, V]        ----->   added to dW [D, V]
    | padding |
    +---------+

The loss is a sum over tokens, so its gradient is known up to one factor as soon as the logits of a
chunk are. The forward pass therefore computes both gradients, while the logits exist. For the
backward pass it keeps dx in the dtype of x, and dW in the dtype of W, and nothing else: no logits
and no softmax. The backward pass multiplies both by the gradient that arrives, a scalar.

Letters: B rows, T tokens, D model width, V vocabulary, n tokens of a chunk. Where the columns of W
are sharded, each device has the logits of its columns alone; `local.Columns` reduces over all.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qkvjax.parallel import local, rules

# How many logits exist at a time, n V on a device: what a core's cache holds on a CPU, and half a
# GiB of float32 on an accelerator, whose products need more rows.
CHUNK = {"cpu": 2**21}
CHUNK_ELSEWHERE = 2**27
FEWEST_TOKENS = 64  # of a chunk, however large the vocabulary is


def cross_entropy(logits_BTV, targets_BT, weights_BT) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted negative log-likelihood and squared log-normaliser of each label.

    Args:
      logits_BTV: float32 or wider [B, T, V].
      targets_BT: int [B, T].
      weights_BT: [B, T]; labels of weight 0 are not scored.

    Returns:
      (nats, squares), each [B, T]: -w log p(target), and w log(Z)^2 for the z-loss
      (Chowdhery et al. 2022, section 5).
    """
    log_z = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_logits = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return weights_BT * (log_z - target_logits), weights_BT * log_z**2


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy(x_BTD, w_DV, targets_BT, weights_BT, z_loss: float = 0.0):
    """Returns the sums over labels of `cross_entropy` for logits x W, without holding all logits.

    Only x and W get gradients. That of W is summed over tokens in float32 or wider, and across
    devices in a dtype no narrower than that of W.

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
    """Returns (loss, nats), and (dx, dW) for the backward pass, where the loss has gradient 1."""
    loss_of_device = functools.partial(_sum_chunks, z_loss=z_loss)
    dx, totals, dw = local.map_tokens(loss_of_device, w.astype(x.dtype), x, targets, weights)
    return totals, (dx, rules.place_like(dw.astype(w.dtype), w))


def _backward(z_loss, gradients, cotangents):
    """Returns the gradients of the four arrays; the nats, which are logged, pass none on."""
    loss_cotangent, _ = cotangents
    dx, dw = gradients
    dx = (loss_cotangent * dx).astype(dx.dtype)
    dw = (loss_cotangent * dw).astype(dw.dtype)
    return dx, dw, None, None


linear_cross_entropy.defvjp(_forward, _backward)


def label_scores(x_BTD, w_DV, targets_BT, weights_BT) -> tuple[jax.Array, jax.Array]:
    """Scores each label by the logits x W, without holding all logits and without gradients.

    Args: as in `linear_cross_entropy`.

    Returns:
      (-w log p(target), float32 or wider [B, T]; whether the target is the likeliest of the
      vocabulary, bool [B, T]: of equal logits the first counts).
    """
    arrays = x_BTD, targets_BT, weights_BT
    return local.map_tokens(_score_chunks, w_DV.astype(x_BTD.dtype), *arrays, sums=False)


# ---- chunks -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """How the tokens [B, T] of a device are cut into chunks.

    Attributes:
      shape: (B, T).
      count: chunks.
      size: tokens of a chunk, n; count x size is at least B T.
    """

    shape: tuple[int, int]
    count: int
    size: int

    @classmethod
    def for_tokens(cls, shape: tuple[int, int], vocab: int) -> _Chunks:
        """Returns chunks whose logits over `vocab` columns fit, all of one size."""
        tokens = shape[0] * shape[1]
        limit = CHUNK.get(rules.platform(), CHUNK_ELSEWHERE)
        count = -(-tokens // max(FEWEST_TOKENS, limit // vocab))
        return cls(shape, count, -(-tokens // count))

    def cut(self, array: jax.Array) -> jax.Array:
        """Returns [B, T, ...] as [count, size, ...]; zeros fill the last chunk, and weigh 0."""
        tokens = self.shape[0] * self.shape[1]
        flat = array.reshape(tokens, *array.shape[2:])
        padding = [(0, self.count * self.size - tokens)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(self.count, self.size, *flat.shape[1:])

    def join(self, array: jax.Array) -> jax.Array:
        """Returns [count, size, ...] as [B, T, ...], without what fills the last chunk."""
        tokens = self.shape[0] * self.shape[1]
        flat = array.reshape(-1, *array.shape[2:])
        return flat[:tokens].reshape(*self.shape, *array.shape[2:])

    def scan(self, f, carry, arrays: tuple[jax.Array, ...]):
        """Calls `jax.lax.scan` over the chunks of arrays that are cut; one chunk needs no loop."""
        return jax.lax.scan(f, carry, arrays, unroll=self.count == 1)


def _sum_chunks(columns, w, x, targets, weights, z_loss):
    """Returns dx [B, T, D], (loss, nats) and dW [D, V] of one device's tokens and columns."""
    chunks = _Chunks.for_tokens(targets.shape, w.shape[1])
    arrays = tuple(chunks.cut(array) for array in (x, targets, weights))

    def loss_of(chunk):
        return _loss_and_gradients(columns, w, *chunk, z_loss)

    def add(sums, chunk):
        dx, *terms = loss_of(chunk)
        return jax.tree.map(jnp.add, sums, tuple(terms)), dx

    _, *abstract = jax.eval_shape(lambda: loss_of(tuple(array[0] for array in arrays)))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tuple(abstract))
    (totals, dw), dx = chunks.scan(add, zeros, arrays)
    return chunks.join(dx), totals, dw


def _score_chunks(columns, w, x, targets, weights):
    """Returns the nats, and whether the target is likeliest, of one device's tokens [B, T]."""
    chunks = _Chunks.for_tokens(targets.shape, w.shape[1])
    arrays = tuple(chunks.cut(array) for array in (x, targets, weights))

    def score(_, chunk):
        x, targets, weights = chunk
        logits, largest, normaliser, target_logits = _logits(columns, w, x, targets)
        log_z = largest[:, 0] + jnp.log(normaliser[:, 0])
        # Each device names its first column with the largest logit, if it has one. The smallest of
        # these is the first in the vocabulary.
        first = columns.first(w.shape[1]) + jnp.argmax(logits, axis=-1)
        has_largest = jnp.max(logits, axis=-1) == largest[:, 0]
        likeliest = columns.min(jnp.where(has_largest, first, jnp.iinfo(jnp.int32).max))
        return None, (weights * (log_z - target_logits), likeliest == targets)

    _, scores = chunks.scan(score, None, arrays)
    return jax.tree.map(chunks.join, scores)


# ---- one chunk --------------------------------------------------------------------------------


def _logits(columns, w, x, targets):
    """Returns the logits of n tokens and what a softmax needs of them.

    Returns:
      (logits of this device's columns, [n, V]; over all columns the largest logit [n, 1], the sum
      of exp(logit - largest) [n, 1] and the target's logit [n]).
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.matmul(x, w, preferred_element_type=wide)
    largest = columns.max(jnp.max(logits, axis=-1, keepdims=True))
    normaliser = columns.sum(jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True))
    # One device has the target's column; the others add 0. An index beyond the last column reads
    # the fill value, but a negative index would count from the end.
    index = targets - columns.first(w.shape[1])
    target_logits = jnp.take_along_axis(logits, index[:, None], axis=-1, mode="fill", fill_value=0)[
        :, 0
    ]
    target_logits = columns.sum(jnp.where(index < 0, 0, target_logits))
    return logits, largest, normaliser, target_logits


def _loss_and_gradients(columns, w, x, targets, weights, z_loss):
    """Returns dx [n, D], (loss, nats) and dW [D, V], of n tokens."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits, largest, normaliser, target_logits = _logits(columns, w, x, targets)
    log_z = (largest + jnp.log(normaliser))[:, 0]
    nats = jnp.sum(weights * (log_z - target_logits))
    loss = nats + z_loss * jnp.sum(weights * log_z**2)

    # d log Z / d logit is the softmax p, so that
    # d loss / d logit = w ((1 + 2 z_loss log Z) p - [this column is the target's]).
    scale = (weights * (1 + 2 * z_loss * log_z))[:, None] / normaliser
    dlogits = jnp.exp(logits - largest) * scale
    is_target = columns.first(w.shape[1]) + jnp.arange(w.shape[1]) == targets[:, None]
    dlogits = (dlogits - jnp.where(is_target, weights[:, None], 0)).astype(x.dtype)

    x_transposed = x.T
    if rules.platform() == "cpu":
        # The barrier writes x^T out first: XLA's CPU is a quarter slower on a product that reads
        # it by columns.
        x_transposed = jax.lax.optimization_barrier(x_transposed)
    dw = jnp.matmul(x_transposed, dlogits, preferred_element_type=wide)
    dx = columns.sum(jnp.matmul(dlogits, w.T, preferred_element_type=wide))
    return dx.astype(x.dtype), (loss, nats), dw
