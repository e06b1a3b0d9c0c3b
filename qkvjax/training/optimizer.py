"""AdamW and Muon on the parameter pytree, and their learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qkvjax.parallel import local, rules

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
            fall = decay_steps(total)
            rest = peak + (final - peak) * jnp.clip((step - (total - fall)) / fall, 0, 1)
        elif name == "multistep":
            rest = peak * 0.1 ** ((step >= total / 2) + (step >= 0.75 * total) * 1.0)
        else:
            rest = jnp.full_like(step, peak)
        return rest * jnp.minimum(1, (step + 1) / max(1, warmup))

    return rate


def decay_steps(total: int) -> int:
    """Steps at the end of a run of `total` in which wsd's learning rate falls."""
    return max(1, round(WSD_DECAY * total))


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


def scale_by_step_rate(rate: Callable) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the learning rate of the step that the caller names.

    optax's own transformation counts its updates. That count is taken back with a bad step, and
    would lag behind the run's steps for the rest of the run. The state is optax's, so that
    checkpoints of either can be read; a caller that names no step gets the rate of the count.
    """

    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, step=None, **others):
        step = state.count if step is None else step
        factor = -rate(step)
        scaled = jax.tree.map(lambda u: jnp.asarray(factor, u.dtype) * u, updates)
        return scaled, optax.ScaleByScheduleState(count=step + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def adamw(optimizer, rate: Callable) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) from the `optimizer` group of a config.

    Clipping is the train step's business, which knows the norm already.
    """
    mask = decayed if optimizer.decay == "matrices" else None
    return optax.chain(
        optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2),
        optax.add_decayed_weights(optimizer.weight_decay, mask=mask),
        scale_by_step_rate(rate),
    )


# Of Muon: decay of the momentum, and the root mean square that an update has in AdamW.
MOMENTUM, LIKE_ADAMW = 0.95, 0.2


def muon(optimizer, rate: Callable) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for everything else.

    A matrix moves by its momentum made orthogonal (five Newton-Schulz steps), at the scale at
    which AdamW's learning rate and decay serve both (Liu et al. 2025, equation 4).
    """

    def axes(updates):
        last = lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)  # noqa: E731
        return jax.tree.map(last, updates)

    def scaled(updates, params=None):
        return jax.tree.map(lambda x: LIKE_ADAMW * max(x.shape[-2:]) ** 0.5 * x, updates)

    orthogonal = optax.contrib.scale_by_muon(beta=MOMENTUM, weight_dimension_numbers=axes)

    def update(updates, state, params=None):
        # Products of a matrix with itself: Explicit axes would have each of them typed.
        return local.automatic(orthogonal.update, (updates, state), updates, state)

    matrices = optax.chain(
        optax.GradientTransformation(orthogonal.init, update),
        optax.stateless(scaled),
        optax.add_decayed_weights(optimizer.weight_decay),
        scale_by_step_rate(rate),
    )
    return optax.partition({"blocks": matrices, "rest": adamw(optimizer, rate)}, _of_blocks)


def _of_blocks(params) -> object:
    """A tree of "blocks" for the matrices of blocks and "rest" for everything else."""
    inside = rules.MATRICES.keys() - {"embedding", "head"}

    def label(path, _):
        names = path_names(path)
        return "blocks" if is_matrix(path) and not inside.isdisjoint(names) else "rest"

    return jax.tree_util.tree_map_with_path(label, params)


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def narrow(model, dtype):
    """A model whose matrices of blocks are in `dtype`; what is looked up or added stays."""
    cast = lambda label, leaf: leaf.astype(dtype) if label == "blocks" else leaf  # noqa: E731
    return jax.tree.map(cast, _of_blocks(model), model)


def with_masters(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` on float32 masters of what `narrow` makes narrow.

    Its state is (masters, None for other parameters; the state of `tx`), begun with parameters
    before they are made narrow; its updates are the new parameters themselves.
    """
    absent = {"is_leaf": lambda leaf: leaf is None}

    def init(params):
        keep = lambda label, leaf: leaf if label == "blocks" else None  # noqa: E731
        return jax.tree.map(keep, _of_blocks(params), params), tx.init(params)

    def update(grads, state, params, **extra):
        masters, inner = state
        full = jax.tree.map(lambda m, p: p if m is None else m, masters, params, **absent)
        updates, inner = tx.update(grads, inner, full, **extra)
        full = optax.apply_updates(full, updates)
        masters = jax.tree.map(lambda m, p: None if m is None else p, masters, full, **absent)
        return jax.tree.map(lambda new, p: new.astype(p.dtype), full, params), (masters, inner)

    return optax.GradientTransformationExtraArgs(init, update)
