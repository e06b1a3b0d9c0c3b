"""Cross-entropy of next tokens, in nats."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
