"""AdamW on the parameter pytree, and its learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

# The last part of a WSD run, in which the learning rate falls (Hu et al. 2024, section 4).
WSD_DECAY = 0.2


def schedule(
    name: str, peak: float, final: float, warmup: int, total: int
) -> Callable[[jax.Array], jax.Array]:
    """The learning rate of step 0, 1, ... as a function.

    Args:
      name: "cosine" from peak to final over the run; "wsd" stays at the peak and falls
        linearly to final in the last fifth; "multistep" is a tenth of the peak from half of
        the run on and a hundredth from three quarters on; "constant" stays.
      peak, final: learning rates.
      warmup: steps of linear rise; step t < warmup has peak * (t + 1) / warmup.
      total: steps of the run.
    """

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        if name == "cosine":
            done = jnp.clip((step - warmup) / max(1, total - warmup), 0, 1)
            rest = final + (peak - final) * (1 + jnp.cos(jnp.pi * done)) / 2
        elif name == "wsd":
            fall = max(1, round(WSD_DECAY * total))
            rest = peak + (final - peak) * jnp.clip((step - (total - fall)) / fall, 0, 1)
        elif name == "multistep":
            rest = peak * 0.1 ** ((step >= total / 2) + (step >= 0.75 * total) * 1.0)
        else:
            rest = jnp.full_like(step, peak)
        return rest * jnp.minimum(1, (step + 1) / max(1, warmup))

    return rate


def path_names(path) -> tuple[str, ...]:
    """The names on the way to a leaf of a tree: attributes and keys, without indices."""
    found = (getattr(entry, "name", getattr(entry, "key", None)) for entry in path)
    return tuple(name for name in found if isinstance(name, str))


def is_matrix(path) -> bool:
    """Whether the leaf at this tree path is a matrix: not a gain, a bias or a counter.

    Names decide, since stacked gains have two dimensions as well.
    """
    return not {"weight", "embedding", "positions"}.isdisjoint(path_names(path))


def decayed(params) -> object:
    """A tree of bools like `params`: True for matrices."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), params)


def adamw(optimizer, rate: Callable) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) from the `optimizer` group of a config.

    Clipping is the train step's business, which knows the norm already.
    """
    return optax.chain(
        optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2),
        optax.add_decayed_weights(
            optimizer.weight_decay, mask=decayed if optimizer.decay == "matrices" else None
        ),
        optax.scale_by_learning_rate(rate),
    )
