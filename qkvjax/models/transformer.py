"""The transformer block, and the stack of all blocks.

Letters: B rows, T tokens, D model width, L layers.

How layers are stored and how they are run are two decisions.

Storage depends on the spec alone, so that a checkpoint fits every machine. A shallow stack, of up
to `spec.UNROLL_UP_TO` layers, has separate arrays for each layer. A deep one keeps the layers that
are alike in one array for each parameter. Six layers that alternate between local and global
attention would be stored as

    layer           0       1       2       3       4       5
                    local   global  local   global  local   global

    blocks[0]       0, 2, 4         each parameter [3, ...]
    blocks[1]       1, 3, 5         each parameter [3, ...]

When it runs, `Stack` either calls the layers one by one, or scans over the repetitions of the
pattern:

    for r in 0, 1, 2:   x = blocks[0][r](x);   x = blocks[1][r](x)

    layers          CPU, no rematerialisation       elsewhere, or with rematerialisation
    shallow         one by one                      scan, over arrays stacked in the program
    deep            scan                            scan

A stack in which no pattern repeats is stored and run one by one everywhere.

- One by one is fastest on a CPU. On two cores a scan costs a shallow model a quarter of its step,
  and slicing stacked weights costs 5 % of it.
- A scan compiles one repetition, whatever the depth. One by one, a deep model takes minutes to
  compile, and compilers of accelerators take time for each layer.
- Rematerialisation needs the loop: XLA's CPU undoes it where it sees all layers at once.

Decoding always runs layer by layer, see `models.unrolled`.
"""

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

# ---- rematerialisation ------------------------------------------------------------------------

# The name by which policies of rematerialisation know the output of attention.
ATTENTION = "attention"


def _keep_all(block):
    """Returns the block as it is: the backward pass computes nothing again."""
    return block


def _keep_products(block):
    """Returns a block that keeps its products with parameters and the output of attention.

    The backward pass computes everything else again: norms, activations, and scores, whose memory
    grows with T^2.
    """
    policies = jax.checkpoint_policies
    policy = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENTION)
    )
    return jax.checkpoint(block, policy=policy)


# `jax.checkpoint` alone keeps a block's input and computes all of the block again.
REMAT = {"none": _keep_all, "dots": _keep_products, "block": jax.checkpoint}


# ---- parts of a model -------------------------------------------------------------------------

# `init` -> the standard deviation of initial values, as `Linear` takes it.
STD = {"normal": 0.02, "fan_in": None, "uniform": "uniform"}


def norm(spec: ModelSpec) -> nnx.Module:
    """Returns a norm over D of the kind that the model uses."""
    if spec.norm == "layernorm":
        return LayerNorm(spec.d_model, bias=spec.use_bias)
    return RMSNorm(spec.d_model)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Returns x after inverted dropout; without a key or a rate, x itself."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding)
    return jnp.where(keep, x / (1 - rate), 0)


def feed_forward(spec: ModelSpec, key: jax.Array) -> MLP | Experts:
    """Returns the feed-forward of a block: x -> (y, losses and loads of a router or None)."""
    make = Experts if spec.feed_forward.experts > 1 else MLP
    std = STD[spec.init]
    out_std = std
    if spec.init == "fan_in":
        out_std = (2 * spec.num_layers * spec.d_ff) ** -0.5
    return make(spec, key=named_key(key, "mlp"), std=std, out_std=out_std)


def position_table(spec: ModelSpec, key: jax.Array, std: float) -> nnx.Param | None:
    """Returns the learned table of positions, [max_length, D]; None where none is learned.

    Its values are normal, with the standard deviation of the spec, or `std` where it has none.
    """
    if spec.position != "learned":
        return None
    std = std if spec.position_std is None else spec.position_std
    shape = (spec.max_length, spec.d_model)
    return nnx.Param(std * jax.random.normal(named_key(key, "positions"), shape))


def add_positions(x: jax.Array, spec: ModelSpec, table: nnx.Param | None, positions) -> jax.Array:
    """Returns x [B, T, D] plus what positions int [B, T] add at the input."""
    if table is not None:
        return x + tables.embed(table[...], positions).astype(x.dtype)
    if spec.position == "sincos":
        return x + sincos(positions, spec.d_model).astype(x.dtype)
    return x


# ---- block ------------------------------------------------------------------------------------


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); without `mlp` where layers share one.

    Args:
      layer: its attention.
      spec: the model's.
      key: a PRNG key.
    """

    def __init__(self, layer: AttentionSpec, spec: ModelSpec, key):
        std = STD[spec.init]
        out_std = std
        if spec.init == "fan_in":
            out_std = (2 * spec.num_layers * layer.num_heads * layer.head_dim) ** -0.5
        self.dropout_rate = spec.dropout
        # A ViT drops inside the feed-forward and not what attention adds, as in the paper.
        self.drops_hidden = spec.kind == "vit"
        self.attention_norm = norm(spec)
        make = LAYERS[type(layer)]
        self.attention = make(layer, key=named_key(key, "attention"), std=std, out_std=out_std)
        self.mlp_norm = norm(spec)
        self.mlp = feed_forward(spec, key) if spec.feed_forward.layers == 1 else None

    def __call__(self, x, positions, segment_ids=None, key=None, *, impl=None):
        """Returns (the next x, losses and loads of the router or None).

        Args:
          x: [B, T, D].
          positions: int [B, T].
          segment_ids: int [B, T], or None.
          key: a PRNG key turns dropout on.
          impl: which implementation computes attention; None means the spec's.
        """
        first_key, last_key = (None, None) if key is None else jax.random.split(key)
        attention_key = None if self.drops_hidden else first_key
        hidden_key = first_key if self.drops_hidden else None

        def drop_hidden(hidden):
            return dropout(hidden, self.dropout_rate, hidden_key)

        y = self.attention(self.attention_norm(x), positions, segment_ids, impl=impl)
        y = checkpoint_name(y, ATTENTION)
        x = x + dropout(y, self.dropout_rate, attention_key)
        y, router = self.mlp(self.mlp_norm(x), drop_hidden)
        return x + dropout(y, self.dropout_rate, last_key), router

    def decode(self, x, cache, start, *, table=None, rotations=None, impl=None):
        """Returns (the next x, the cache) for new tokens x [B, T, D] that join `cache`.

        Arguments as in `attention.cache.attend`.
        """
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
        y, _ = self.mlp(self.mlp_norm(x))
        return x + y, cache


# ---- stack ------------------------------------------------------------------------------------


class Stack(nnx.Module):
    """All blocks, stored and run as the module says.

    Attributes:
      blocks: `blocks[j]` holds the layers j, j + period, j + 2 period, ...: each parameter has a
        leading axis [L / period]. Where each layer has arrays of its own, the period is L.
      shared: where G layers share a feed-forward, `shared[j // G]` is that of `blocks[j]`, with
        the same leading axis; else None.
      pattern: layers after which the same kinds of layers follow again.
      group: G, 1 where no feed-forward is shared.
    """

    def __init__(self, spec: ModelSpec, *, key):
        period = spec.period
        repeats = spec.num_layers // period
        keys = jax.random.split(key, spec.num_layers).reshape(repeats, period)

        def blocks_of(j):
            return jax.vmap(lambda k: Block(spec.layers[j], spec, k))(keys[:, j])

        def feed_forwards_of(j):
            return jax.vmap(lambda k: feed_forward(spec, k))(keys[:, j])

        self.num_layers = spec.num_layers
        self.pattern = spec.pattern
        self.group = spec.feed_forward.layers
        self.blocks = nnx.List([blocks_of(j) for j in range(period)])
        shared = None
        if self.group > 1:
            shared = nnx.List([feed_forwards_of(j) for j in range(0, period, self.group)])
        self.shared = shared

    def __call__(
        self, x, positions, segment_ids=None, key=None, *, impl=None, remat="none", unroll=1
    ):
        """Returns (the next x, means over layers of the router's losses and loads, or None).

        Args:
          x: [B, T, D].
          positions: int [B, T].
          segment_ids: int [B, T], or None.
          key: a PRNG key turns dropout on.
          impl: which implementation computes attention; None means the spec's.
          remat: one of REMAT.
          unroll: repetitions in one iteration of the scan.
        """
        blocks, shared = self._arrays_to_run(remat)
        period = len(blocks)
        repeats = self.num_layers // period
        keys = None
        if key is not None:
            keys = jax.random.split(key, self.num_layers).reshape(repeats, period)

        @REMAT[remat]
        def run_block(block, x, key):
            return block(x, positions, segment_ids, key, impl=impl)

        def run_repetition(x, arrays):
            blocks, shared, keys = arrays
            routers = []
            for j, block in enumerate(blocks):
                block = self._with_shared_mlp(block, j, shared)
                x, router = run_block(block, x, None if keys is None else keys[j])
                routers.append(router)
            return x, jax.tree.map(lambda *values: sum(values) / period, *routers)

        arrays = blocks, shared, keys
        if repeats == 1:
            return run_repetition(x, jax.tree.map(lambda a: a[0], arrays))
        x, routers = jax.lax.scan(run_repetition, x, arrays, unroll=min(unroll, repeats))
        return x, jax.tree.map(jnp.mean, routers)

    def _arrays_to_run(self, remat: str) -> tuple[list, list | None]:
        """Returns the blocks and shared feed-forwards of one repetition, stacked over repetitions.

        As they are stored, or, where a shallow stack is to be scanned, stacked here.
        """
        blocks = list(self.blocks)
        shared = None if self.shared is None else list(self.shared)
        is_stacked = len(blocks) == self.pattern
        runs_one_by_one = rules.platform() == "cpu" and remat == "none"
        if is_stacked or runs_one_by_one:
            return blocks, shared
        blocks = _stack_alike(blocks, self.pattern)
        if shared is not None:
            shared = _stack_alike(shared, self.pattern // self.group)
        return blocks, shared

    def _with_shared_mlp(self, block: Block, index: int, shared) -> Block:
        """Gives the block `index` of a repetition the feed-forward that it shares, if it does.

        The block is changed: callers pass a copy.
        """
        if shared is not None:
            block.mlp = nnx.data(shared[index // self.group])
        return block

    def layer(self, index: int) -> Block:
        """Returns block `index` with arrays of its own."""
        period = len(self.blocks)
        shared = None if self.shared is None else list(self.shared)
        parts = self.blocks[index % period], shared
        block, shared = jax.tree.map(lambda a: a[index // period], parts)
        return self._with_shared_mlp(block, index % period, shared)

    def layers(self) -> list[Block]:
        """Returns the blocks one by one, in order, each with arrays of its own.

        Decoding reads every weight for each token; slicing a stacked array would copy it
        each time.
        """
        return [self.layer(index) for index in range(self.num_layers)]


def _stack_alike(modules: list, period: int) -> list:
    """Returns `period` modules, of which number j has the arrays of modules j, j + period, ...

    The arrays are joined along their leading axis.
    """

    def join(*alike):
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *alike)

    return [join(*modules[j::period]) for j in range(period)]


def with_stack(model: nnx.Module, stack: nnx.Module | None) -> nnx.Module:
    """Returns the model with another stack, or with none; its other arrays are the same."""
    # A tree map copies the module with the stack that it has at that moment.
    old = model.stack
    model.stack = stack
    changed = jax.tree.map(lambda leaf: leaf, model)
    model.stack = old
    return changed


def without_stack(model: nnx.Module) -> nnx.Module:
    """Returns the model without its layers: what comes before and after them."""
    return with_stack(model, None)
