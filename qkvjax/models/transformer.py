"""The block and the scanned stack."""

from __future__ import annotations

import jax
from flax import nnx

from qkvjax.attention import cache as caches
from qkvjax.attention.layer import LAYERS
from qkvjax.attention.projection import LayerNorm, RMSNorm, named_key
from qkvjax.attention.spec import AttentionSpec
from qkvjax.models.mlp import MLP
from qkvjax.models.spec import ModelSpec

# What the backward pass computes again instead of keeping: nothing, all but matrix products, or
# all of a block.
REMAT = {
    "none": lambda f: f,
    "dots": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
    "block": jax.checkpoint,
}
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


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, layer: AttentionSpec, spec: ModelSpec, key):
        if spec.init != "fan_in":
            std = out_std = mlp_out_std = STD[spec.init]
        else:
            depth = (2 * spec.num_layers) ** -0.5
            std = None
            out_std = depth * (layer.num_heads * layer.head_dim) ** -0.5
            mlp_out_std = depth * spec.d_ff**-0.5
        self.rate, self.inside = spec.dropout, spec.kind == "vit"  # where dropout acts
        self.attention_norm = norm(spec)
        self.attention = LAYERS[type(layer)](
            layer, key=named_key(key, "attention"), std=std, out_std=out_std
        )
        self.mlp_norm = norm(spec)
        self.mlp = MLP(spec, key=named_key(key, "mlp"), std=std, out_std=mlp_out_std)

    def __call__(self, x, positions, segment_ids=None, key=None, *, impl="auto") -> jax.Array:
        """[B, T, D] -> [B, T, D]; `key` turns dropout on."""
        keys = (None, None) if key is None else jax.random.split(key)
        y = self.attention(self.attention_norm(x), positions, segment_ids, impl=impl)
        x = x + (y if self.inside else dropout(y, self.rate, keys[0]))
        hidden = self.mlp.hidden(self.mlp_norm(x))
        hidden = dropout(hidden, self.rate, keys[0]) if self.inside else hidden
        return x + dropout(self.mlp.down(hidden), self.rate, keys[1])

    def decode(self, x, cache, start, *, table=None, turns=None, impl="auto"):
        """The same for new tokens that join `cache`; arguments as in `attention.cache.attend`."""
        y, cache = caches.attend(
            self.attention,
            self.attention_norm(x),
            cache,
            start,
            table=table,
            turns=turns,
            impl=impl,
        )
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Stack(nnx.Module):
    """All blocks: a scan over the repetitions of the layer pattern.

    `blocks[j]` holds layer j of every repetition, each parameter with a leading axis
    [L / period]. An unrolled stack is one repetition.
    """

    def __init__(self, spec: ModelSpec, *, key):
        self.num_layers = spec.num_layers
        repeats = spec.num_layers // spec.period
        keys = jax.random.split(key, spec.num_layers).reshape(repeats, spec.period)
        self.blocks = nnx.List([
            jax.vmap(lambda k, layer=layer: Block(layer, spec, k))(keys[:, j])
            for j, layer in enumerate(spec.layers[: spec.period])
        ])  # fmt: skip

    def __call__(
        self, x, positions, segment_ids=None, key=None, *, impl="auto", remat="none"
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D]; `remat` is one of REMAT."""
        period = len(self.blocks)
        repeats = self.num_layers // period
        keys = None
        if key is not None:
            keys = jax.random.split(key, self.num_layers).reshape(repeats, period)

        @REMAT[remat]
        def layer(block, x, key):
            return block(x, positions, segment_ids, key, impl=impl)

        def repetition(x, scanned):
            blocks, keys = scanned
            for j, block in enumerate(blocks):
                x = layer(block, x, None if keys is None else keys[j])
            return x, None

        scanned = list(self.blocks), keys
        if repeats == 1:
            return repetition(x, jax.tree.map(lambda a: a[0], scanned))[0]
        return jax.lax.scan(repetition, x, scanned)[0]

    def layers(self) -> list[Block]:
        """The blocks one by one, in order, each with its own arrays.

        Decoding reads every weight for each token; slicing a stacked array would copy it
        each time.
        """
        period = len(self.blocks)
        return [
            jax.tree.map(lambda a, i=i: a[i // period], self.blocks[i % period])
            for i in range(self.num_layers)
        ]
