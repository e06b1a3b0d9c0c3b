"""From a resolved configuration to everything a run needs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qkvjax.data.dataset import Dataset
from qkvjax.data.examples import Examples
from qkvjax.data.open import open_dataset
from qkvjax.data.tokenizers import tokenizer_size
from qkvjax.durations import to_steps
from qkvjax.errors import UserError
from qkvjax.fields import Config
from qkvjax.models.build import make
from qkvjax.models.spec import ModelSpec, model_spec
from qkvjax.parallel import host_batch, rules
from qkvjax.parallel.mesh import make_mesh
from qkvjax.training.optimizer import narrow
from qkvjax.training.step import (
    init_state,
    make_optimizer,
    make_train_step,
    on_leaves,
    state_shardings,
)


class Durations(NamedTuple):
    """What the config's durations are in steps."""

    steps: int
    warmup: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep_every: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A run before its first step."""

    config: Config
    dataset: Dataset | Examples
    spec: ModelSpec
    durations: Durations
    mesh: jax.sharding.Mesh
    optimizer: object
    rate: Callable
    abstract: object  # the train state as ShapeDtypeStructs with shardings

    @property
    def tokens_per_step(self) -> int:
        return self.config.data.batch_size * self.config.data.seq_len

    @property
    def train_flops_per_token(self) -> float:
        """Two FLOPs a multiply-add; the backward pass costs twice the forward."""
        seq_len = self.config.data.seq_len
        return 3 * 2 * self.spec.forward_macs(seq_len) / seq_len

    @property
    def micro_batch(self) -> int:
        """Sequences of a micro-batch, over all processes."""
        return self.config.data.batch_size // self.config.train.accumulation

    @functools.cached_property
    def _host_rows(self) -> slice:
        return host_batch.host_rows(self.mesh, self.micro_batch)

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of a step on the mesh, [A, B/A, T]; each process makes its devices' rows."""
        c = self.config
        sizes = (c.data.batch_size, c.train.accumulation)
        rows = self.dataset.batch(c.seed, step, *sizes, self._host_rows)
        return host_batch.place(rows, self.mesh, self.micro_batch)

    def init(self):
        """The state before the first step, on the mesh: the same bits on any."""
        begin = functools.partial(init_state, self.spec, self.optimizer, config=self.config)
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        # For a CPU the compiler takes other instructions, which round differently, for parts.
        whole = self.mesh.size > 1 and rules.platform() == "cpu"
        with jax.set_mesh(None):  # with a mesh in the types, the last bit of a draw depends on it
            key = jax.random.key(self.config.seed)
            state = jax.jit(begin, out_shardings=None if whole else places)(key)
        return jax.tree.map(_cut, state, places) if whole else state

    def new_model(self, dtype: str):
        """The model with initial values, the blocks' matrices in `dtype`."""
        return narrow(make(self.spec, jax.random.key(self.config.seed)), dtype)

    def compile_step(self, state):
        """The compiled train step on the state's leaves, which are donated:
        (leaves, batch) -> (leaves, metrics)."""
        leaves, tree = jax.tree.flatten(state)
        step = on_leaves(make_train_step(self.config, self.optimizer, self.rate), tree)
        step = jax.jit(step, donate_argnums=0)
        return step.lower(leaves, self.batch(0)).compile()


def _cut(array: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
    """An array that each process has whole, on the mesh."""
    return jax.make_array_from_callback(array.shape, place, jax.device_get(array).__getitem__)


def resolve_durations(config: Config, dataset: Dataset) -> Durations:
    """The durations of a config in steps, given how long an epoch is."""
    common = _lengths(config, dataset)
    steps = to_steps(config.train.steps, "train.steps", **common)
    if steps < 1:
        raise UserError(f"train.steps={config.train.steps!r}: there is nothing to train")

    def within(group, field):
        value = getattr(getattr(config, group), field)
        if value is None:
            return 0
        return to_steps(value, f"{group}.{field}", total=steps, **common)

    warmup = within("optimizer", "warmup_steps")
    names = ("log_every", "eval_every", "checkpoint_every", "keep_every")
    each = {name: within("train", name) for name in names}
    return Durations(steps, warmup, **each)


def steps_of(run: Run, value) -> int:
    """A value of `train.steps` in steps of this run's data."""
    return to_steps(value, "train.steps", **_lengths(run.config, run.dataset))


def _lengths(config: Config, dataset) -> dict[str, int]:
    """What `to_steps` wants to know of a run's data."""
    return {
        "tokens_per_step": config.data.batch_size * config.data.seq_len,
        "steps_per_epoch": dataset.steps_per_epoch(config.data.batch_size),
    }


def prepare_run(
    config: Config, *, dataset=None, log: Callable[[str], None] = print, devices=None
) -> Run:
    """Prepares the data of a configuration, its mesh and the shapes of the train state.

    Call it, and everything on the run, under `jax.set_mesh(run.mesh)` from here on.

    Args:
      dataset: from `open_data`, where that was called before.

    Raises:
      UserError: anything in the config or the data that does not fit.
    """
    data = config.data
    dataset = open_dataset(config, log=log) if dataset is None else dataset
    spec = spec_of(config, dataset)
    durations = resolve_durations(config, dataset)
    if data.batch_size > len(dataset.train):
        log(
            f"data: a batch of {data.batch_size:,} rows is larger than an epoch of"
            f" {len(dataset.train):,}, so each step repeats rows: a duration of '2ep' is 2 steps,"
            f" {2 * data.batch_size / len(dataset.train):,.0f} passes over the data"
        )
    mesh = make_mesh(config.mesh.sizes, devices)
    check_mesh(mesh, spec, data.seq_len, data.batch_size // config.train.accumulation)
    optimizer, rate = make_optimizer(config, durations.steps, durations.warmup)
    abstract = abstract_state(spec, optimizer, mesh, config)
    return Run(config, dataset, spec, durations, mesh, optimizer, rate, abstract)


def open_data(
    config: Config, log: Callable[[str], None], alive: Callable[[], None]
) -> Dataset | Examples:
    """The data of a valid config, which may take hours to prepare the first time.

    Raises:
      UserError: see `prepare_run`.
    """
    return open_dataset(config, log=log, alive=alive)


def check_mesh(mesh: jax.sharding.Mesh, spec: ModelSpec, seq_len: int, micro_batch: int) -> None:
    """Raises UserError where a mesh does not divide what it cuts, naming the numbers."""
    fields = {
        "batch": "mesh.replica x mesh.fsdp x mesh.expert",
        "length": "mesh.context",
        "experts": "mesh.expert",
    }
    heads = [
        (f"the {n} query heads", n, "heads", "model.num_heads")
        for n in sorted({layer.num_heads for layer in spec.layers})
    ]
    cut = [
        (
            f"a micro-batch of {micro_batch} sequences",
            micro_batch,
            "batch",
            "data.batch_size, train.accumulation",
        ),
        (f"a sequence of {seq_len} tokens", seq_len, "length", "data.seq_len"),
        *heads,
        (f"the feed-forward width {spec.d_ff}", spec.d_ff, "mlp", "model.mlp_ratio"),
        *(
            (f"the {n} experts", n, "experts", "model.mlp")
            for n in [spec.feed_forward.experts]
            if n > 1
        ),
    ]
    for what, size, name, remedy in cut:
        ways = rules.ways(name, sizes=mesh.shape)
        if size % ways:
            raise UserError(
                f"{what} does not divide over {ways} devices ({fields.get(name, 'mesh.tensor')}):"
                f" change {remedy} or the mesh"
            )
    if spec.kind == "vit" and mesh.shape["context"] > 1:
        raise UserError("a ViT's class token leaves no sequence to cut: set mesh.context=1")


def compile_for(config: Config, spec: ModelSpec, mesh: jax.sharding.Mesh):
    """(compiled, abstract state): the train step of a language model for a mesh's devices, which
    need not be here, without data."""
    optimizer, rate = make_optimizer(config, 1000, 10)
    state = abstract_state(spec, optimizer, mesh, config)
    parts, length = config.train.accumulation, config.data.seq_len
    shape = (parts, config.data.batch_size // parts, length)
    place = rules.sharding(mesh, None, "batch", "length")
    whole = ("inputs", "targets", "positions", "segment_ids")
    dtypes = dict.fromkeys(whole, jnp.int32) | {"weights": jnp.float32}
    batch = {n: jax.ShapeDtypeStruct(shape, t, sharding=place) for n, t in dtypes.items()}
    step = jax.jit(make_train_step(config, optimizer, rate), donate_argnums=0)
    with jax.set_mesh(mesh):
        return step.lower(state, batch).compile(), state


def abstract_state(spec: ModelSpec, optimizer, mesh: jax.sharding.Mesh, config: Config):
    """The train state as ShapeDtypeStructs with shardings."""
    shapes = jax.eval_shape(lambda: init_state(spec, optimizer, jax.random.key(0), config))

    def placed(leaf, place):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(placed, shapes, state_shardings(shapes, mesh))


def planned_spec(config: Config) -> ModelSpec:
    """The language model of a config, without reading data."""
    num_ids = tokenizer_size(config.data.tokenizer)
    return model_spec(
        config.model, num_ids, config.data.seq_len, implementation=config.train.attention
    )


def spec_of(config: Config, dataset: Dataset | Examples) -> ModelSpec:
    """The model of a config for its data."""
    shape = dataset.num_inputs, config.data.seq_len, dataset.num_outputs, dataset.output
    return model_spec(config.model, *shape, config.train.attention)
