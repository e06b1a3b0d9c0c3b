"""The train state and one step of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qkvjax.models.build import make
from qkvjax.models.lm import LanguageModel
from qkvjax.models.loss import cross_entropy, linear_cross_entropy
from qkvjax.models.spec import ModelSpec
from qkvjax.parallel import rules
from qkvjax.training import guard
from qkvjax.training.optimizer import (
    OPTIMIZERS,
    is_matrix,
    narrow,
    path_names,
    schedule,
    with_masters,
)

Batch = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that training changes: one pytree, saved and restored as a whole."""

    model: nnx.Module
    optimizer: optax.OptState
    step: jax.Array  # int32 scalar, steps done
    recent: guard.Recent | None = None  # the last good steps, where spikes are looked for
    average: nnx.Module | None = None  # of the weights, where optimizer.average asks for it


def _wide(array: jax.Array) -> jnp.dtype:
    """Float32, or the array's dtype if that is wider."""
    return jnp.promote_types(array.dtype, jnp.float32)


def init_state(
    spec: ModelSpec, tx: optax.GradientTransformation, key: jax.Array, config
) -> TrainState:
    """The state before the first step, with initial values that follow from `key`."""
    return new_state(make(spec, key), tx, config)


def new_state(model, tx: optax.GradientTransformation, config) -> TrainState:
    """The state before the first step of a model with these weights.

    Args:
      model: float32 or wider; the blocks' matrices are kept in `train.param_dtype`, beside float32
        masters where that is narrower.
    """
    dtype = config.train.param_dtype
    model = jax.tree.map(lambda leaf: leaf.astype(_wide(leaf)), model)
    optimizer = tx.init(model)
    # A copy: donated states have no array twice.
    average = jax.tree.map(jnp.copy, model) if config.optimizer.average else None
    model = model if dtype == "float32" else narrow(model, dtype)
    recent = guard.no_steps() if config.optimizer.skip_spikes else None
    return TrainState(model, optimizer, jnp.zeros((), jnp.int32), recent, average)


def state_shardings(abstract: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Where each leaf lives: matrices as `rules.MATRICES` says, everything else whole."""

    def place(path, leaf):
        if not is_matrix(path):
            return rules.sharding(mesh, *(None,) * leaf.ndim)
        return rules.matrix_sharding(mesh, path_names(path), leaf.shape)

    return jax.tree_util.tree_map_with_path(place, abstract)


def make_optimizer(config, total_steps: int, warmup_steps: int):
    """(transformation, learning rate as a function of the step) for a config."""
    o = config.optimizer
    rate = schedule(o.schedule, o.learning_rate, o.final_learning_rate, warmup_steps, total_steps)
    tx = OPTIMIZERS[o.name](o, rate)
    return tx if config.train.param_dtype == "float32" else with_masters(tx), rate


def averaged(average, model, decay: float | None):
    """The exponential moving average of the weights after one more step; None stays None.

    average + (1 - decay) (model - average), in the average's dtype, computed in float32 or wider.
    """

    def one(a, p):
        wide = a.astype(_wide(a))
        return (wide + (1 - decay) * (p.astype(wide.dtype) - wide)).astype(a.dtype)

    return None if average is None else jax.tree.map(one, average, model)


def on_leaves(step: Callable, tree) -> Callable[[list[jax.Array], Batch], tuple]:
    """A train step that takes and gives the state as its leaves.

    Python flattens and builds every module of a state at each call: 2 ms, or 6 % of the step of a
    model of four layers of width 128 on two cores.
    """

    def train_step(leaves: list[jax.Array], batch: Batch):
        state, metrics = step(jax.tree.unflatten(tree, leaves), batch)
        return jax.tree.leaves(state), metrics

    return train_step


def make_train_step(config, tx, rate: Callable) -> Callable[[TrainState, Batch], tuple]:
    """The function (state, batch) -> (state, metrics), to be compiled by the caller.

    The batch has arrays [A, B/A, T]: A micro-batches one after another. Losses and weights are
    summed over all of them and divided once, so accumulation does not change the loss.

    A bad step (`training.guard`) changes the count of steps alone.

    Metrics are scalars: loss (nats a label, without the z-loss), grad_norm (before clipping),
    learning_rate, whether the step is bad, and of experts what their routers tell, means over
    layers and micro-batches.
    """
    dtype = jnp.dtype(config.train.compute_dtype)
    z_loss, clip = config.optimizer.z_loss, config.optimizer.clip_norm
    threshold = config.optimizer.skip_spikes
    decay = config.optimizer.average
    compiled = {"remat": config.train.remat, "unroll": config.train.unroll}
    seed, has_dropout = config.seed, config.model.dropout > 0
    parts, has_masters = config.train.accumulation, config.train.param_dtype != "float32"
    gradient_dtype = config.train.gradient_dtype
    converts = gradient_dtype != config.train.param_dtype

    def objective(model, batch, key, total):
        segments = batch.get("segment_ids")  # labelled examples have none
        inputs = batch["inputs"], batch["positions"], segments, key
        labels = batch["targets"], batch["weights"]
        if isinstance(model, LanguageModel):  # a vocabulary is too wide to hold all logits
            table = model.embedding_copies()
            x, router = model.hidden(*inputs, dtype=dtype, table=table, **compiled)
            loss, nats = linear_cross_entropy(x, model.head_matrix(table), *labels, z_loss)
            metrics = {"loss": nats / total}
            if router is None:
                return loss / total, metrics
            # Of this micro-batch: they do not add up to those of the whole batch.
            router = jax.tree.map(lambda value: value / parts, router)
            kind = model.spec.feed_forward
            extra = kind.balance * router["balance"] + kind.z_loss * router["z_loss"]
            named = {f"router_{name}": value for name, value in router.items()}
            return loss / total + extra, metrics | named
        logits = model(*inputs, dtype=dtype, **compiled)
        nats, squares = map(jnp.sum, cross_entropy(logits, *labels))
        return (nats + z_loss * squares) / total, {"loss": nats / total}

    def train_step(state: TrainState, batch: Batch):
        total = jnp.maximum(jnp.sum(batch["weights"]), 1)
        gradient = jax.value_and_grad(objective, has_aux=True)
        # A gradient has the dtype of its parameter, also where it crosses devices.
        parameters = narrow(state.model, gradient_dtype) if converts else state.model

        def micro(i, part):
            key = None
            if has_dropout:  # else one program serves all seeds
                key = jax.random.fold_in(jax.random.key(seed), state.step)
                key = jax.random.fold_in(key, i)
            (_, metrics), grads = gradient(parameters, part, key, total)
            return metrics, grads

        if parts == 1:
            metrics, grads = micro(0, jax.tree.map(lambda a: a[0], batch))
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros_like(p, _wide(p)), state.model)

            def add(grads, scanned):
                metrics, more = micro(*scanned)
                return jax.tree.map(jnp.add, grads, more), metrics

            grads, each = jax.lax.scan(add, zeros, (jnp.arange(parts), batch))
            metrics = jax.tree.map(jnp.sum, each)

        grads = jax.tree.map(lambda g: g.astype(_wide(g)), grads)
        norm = optax.global_norm(grads)
        if clip:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1, clip / (norm + 1e-12)), grads)
        updates, optimizer = tx.update(grads, state.optimizer, state.model, step=state.step)
        model = updates if has_masters else optax.apply_updates(state.model, updates)
        average = averaged(state.average, model, decay)
        good, recent = guard.judge(state.recent, metrics["loss"], norm, threshold)
        new = model, optimizer, average
        old = state.model, state.optimizer, state.average
        model, optimizer, average = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        metrics |= {"grad_norm": norm, "learning_rate": rate(state.step), "bad": ~good}
        return TrainState(model, optimizer, state.step + 1, recent, average), metrics

    return train_step
