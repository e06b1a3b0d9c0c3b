"""The block and the scanned stack."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qkvjax.attention import cache as caches
from qkvjax.attention.layer import LAYERS
from qkvjax.attention.layers import LayerNorm, RMSNorm, named_key
from qkvjax.attention.position import sincos
from qkvjax.attention.spec import AttentionSpec
from qkvjax.models.mlp import MLP
from qkvjax.models.moe import Experts
from qkvjax.models.spec import ModelSpec
from qkvjax.parallel import rules, tables

# The output of attention, by the name that policies of rematerialisation know it by.
ATTENTION = "attention"


def _keep_products(block):
    """A block whose backward pass keeps what products with parameters and attention put out, and
    computes everything else again: norms, activations, and scores, whose memory grows with T^2."""
    policies = jax.checkpoint_policies
    policy = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENTION)
    )
    return jax.checkpoint(block, policy=policy)


# What the backward pass computes again instead of keeping: nothing, all but products, or all of a
# block.
REMAT = {"none": lambda block: block, "dots": _keep_products, "block": jax.checkpoint}
# Standard deviation of initial values; what Linear makes of them is said there.
STD = {"normal": 0.02, "fan_in": None, "uniform": "uniform"}


def norm(spec: ModelSpec) -> nnx.Module:
    """The model's norm over D."""
    if spec.norm == "layernorm":
        return LayerNorm(spec.d_model, bias=spec.use_bias)
    return RMSNorm(spec.d_model)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; without a key or a rate, x itself."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding)
    return jax.numpy.where(keep, x / (1 - rate), 0)


def feed_forward(spec: ModelSpec, key: jax.Array) -> MLP | Experts:
    """The feed-forward of a block, x -> (y, what a router tells or None)."""
    make = Experts if spec.feed_forward.experts > 1 else MLP
    std = out_std = STD[spec.init]
    if spec.init == "fan_in":
        out_std = (2 * spec.num_layers * spec.d_ff) ** -0.5
    return make(spec, key=named_key(key, "mlp"), std=std, out_std=out_std)


def position_table(spec: ModelSpec, key: jax.Array, std: float) -> nnx.Param | None:
    """The learned table of positions, from normal values where the spec says no other `std`."""
    if spec.position != "learned":
        return None
    std = std if spec.position_std is None else spec.position_std
    shape = (spec.max_length, spec.d_model)
    return nnx.Param(std * jax.random.normal(named_key(key, "positions"), shape))


def add_positions(x: jax.Array, spec: ModelSpec, table: nnx.Param | None, positions) -> jax.Array:
    """[B, T, D] with what positions int [B, T] add at the input."""
    if table is not None:
        return x + tables.embed(table[...], positions).astype(x.dtype)
    return x + sincos(positions, spec.d_model).astype(x.dtype) if spec.position == "sincos" else x


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); without `mlp` where layers share one."""

    def __init__(self, layer: AttentionSpec, spec: ModelSpec, key):
        std = out_std = STD[spec.init]
        if spec.init == "fan_in":
            out_std = (2 * spec.num_layers * layer.num_heads * layer.head_dim) ** -0.5
        self.rate, self.inside = spec.dropout, spec.kind == "vit"  # where dropout acts
        self.attention_norm = norm(spec)
        make = LAYERS[type(layer)]
        self.attention = make(layer, key=named_key(key, "attention"), std=std, out_std=out_std)
        self.mlp_norm = norm(spec)
        self.mlp = feed_forward(spec, key) if spec.feed_forward.layers == 1 else None

    def __call__(self, x, positions, segment_ids=None, key=None, *, impl=None):
        """[B, T, D] -> (the same, what the router tells or None); `key` turns dropout on."""
        keys = (None, None) if key is None else jax.random.split(key)
        y = self.attention(self.attention_norm(x), positions, segment_ids, impl=impl)
        y = checkpoint_name(y, ATTENTION)
        x = x + (y if self.inside else dropout(y, self.rate, keys[0]))
        drop = lambda hidden: dropout(hidden, self.rate, keys[0] if self.inside else None)  # noqa: E731
        y, router = self.mlp(self.mlp_norm(x), drop)
        return x + dropout(y, self.rate, keys[1]), router

    def decode(self, x, cache, start, *, table=None, rotations=None, impl=None):
        """The same for new tokens that join `cache`; arguments as in `attention.cache.attend`."""
        y, cache = caches.attend(
            self.attention,
            self.attention_norm(x),
            cache,
            start,
            table=table,
            rotations=rotations,
            impl=impl,
        )
        x = x + y
        return x + self.mlp(self.mlp_norm(x))[0], cache


class Stack(nnx.Module):
    """All blocks: a scan over the repetitions of the layer pattern.

    `blocks[j]` holds layer j of every repetition, each parameter with a leading axis
    [L / period]. An unrolled stack is one repetition. Where G layers share a feed-forward it is
    in `shared[j // G]`.
    """

    def __init__(self, spec: ModelSpec, *, key):
        self.num_layers = spec.num_layers
        self.pattern = spec.pattern
        repeats = spec.num_layers // spec.period
        keys = jax.random.split(key, spec.num_layers).reshape(repeats, spec.period)
        self.blocks = nnx.List(
            [
                jax.vmap(lambda k, layer=layer: Block(layer, spec, k))(keys[:, j])
                for j, layer in enumerate(spec.layers[: spec.period])
            ]
        )
        self.group = spec.feed_forward.layers
        self.shared = (
            None
            if self.group == 1
            else nnx.List(
                [
                    jax.vmap(lambda k: feed_forward(spec, k))(keys[:, j])
                    for j in range(0, spec.period, self.group)
                ]
            )
        )

    def __call__(
        self, x, positions, segment_ids=None, key=None, *, impl=None, remat="none", unroll=1
    ):
        """[B, T, D] -> (the same, means over layers of what routers tell, or None).

        Args:
          remat: one of REMAT.
          unroll: repetitions in one turn of the scan.
        """
        blocks, shared = self._scanned(remat)
        period = len(blocks)
        repeats = self.num_layers // period
        keys = None
        if key is not None:
            keys = jax.random.split(key, self.num_layers).reshape(repeats, period)

        @REMAT[remat]
        def layer(block, x, key):
            return block(x, positions, segment_ids, key, impl=impl)

        def repetition(x, scanned):
            blocks, shared, keys = scanned
            routers = []
            for j, block in enumerate(blocks):
                block = self._whole(block, j, shared)
                x, router = layer(block, x, None if keys is None else keys[j])
                routers.append(router)
            return x, jax.tree.map(lambda *values: sum(values) / period, *routers)

        scanned = blocks, shared, keys
        if repeats == 1:
            return repetition(x, jax.tree.map(lambda a: a[0], scanned))
        x, router = jax.lax.scan(repetition, x, scanned, unroll=min(unroll, repeats))
        return x, jax.tree.map(jax.numpy.mean, router)

    def _scanned(self, remat: str) -> tuple[list, list | None]:
        """(blocks, shared feed-forwards) of one turn of the scan, each with all repetitions.

        A shallow stack is kept unrolled, which is the fastest on a CPU. Where a loop is better its
        arrays are stacked here: on accelerators, whose compilers take time by the layer, and for
        rematerialisation, which XLA's CPU undoes where it sees all layers at once.
        """
        blocks = list(self.blocks)
        shared = self.shared and list(self.shared)
        stored = len(blocks)
        if stored == self.pattern or (rules.platform() == "cpu" and remat == "none"):
            return blocks, shared

        def stacked(modules, period):
            return [
                jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *modules[j::period])
                for j in range(period)
            ]

        blocks = stacked(blocks, self.pattern)
        return blocks, shared and stacked(shared, self.pattern // self.group)

    def _whole(self, block: Block, place: int, shared) -> Block:
        """Block number `place` of a repetition with the feed-forward that it shares, if it does."""
        if shared is not None:
            block.mlp = nnx.data(shared[place // self.group])
        return block

    def layer(self, index: int) -> Block:
        """Returns block `index` with arrays of its own."""
        period = len(self.blocks)
        parts = self.blocks[index % period], self.shared and list(self.shared)
        block, shared = jax.tree.map(lambda a: a[index // period], parts)
        return self._whole(block, index % period, shared)

    def layers(self) -> list[Block]:
        """Returns the blocks one by one, in order, each with its own arrays.

        Decoding reads every weight for each token; slicing a stacked array would copy it
        each time.
        """
        return [self.layer(index) for index in range(self.num_layers)]


def with_stack(model: nnx.Module, stack: nnx.Module | None) -> nnx.Module:
    """Returns the model with another stack, or with none; its other arrays are the same."""
    old = model.stack
    model.stack = stack
    changed = jax.tree.map(lambda leaf: leaf, model)
    model.stack = old
    return changed


def without_stack(model: nnx.Module) -> nnx.Module:
    """Returns the model without its layers: what stands before and after them."""
    return with_stack(model, None)
