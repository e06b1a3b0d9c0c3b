"""The bidirectional encoder: sequences of symbols or of vectors, and labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from qkvjax.attention.layers import Linear, named_key, wide_add
from qkvjax.attention.position import by_row
from qkvjax.models.spec import ModelSpec
from qkvjax.models.transformer import STD, Stack, add_positions, dropout, norm, position_table
from qkvjax.parallel import rules, tables


class Encoder(nnx.Module):
    """Symbols or vectors to labels; every position sees every other.

    The paper's synthetic models (Kayyam et al. 2026, section 4.1): one-hot digits through a
    linear embedding, learned positions, pre-norm blocks, a head on each token.

    Args:
      spec: what to build.
      key: a PRNG key; initial values depend on it and on each parameter's name.
    """

    POSITION_STD = 1.0

    def __init__(self, spec: ModelSpec, *, key):
        self.spec = spec
        make = lambda name: named_key(key, name)  # noqa: E731
        options = {"std": STD[spec.init], "bias": spec.use_bias}
        self.input = Linear(spec.vocab_size, spec.d_model, key=make("input"), **options)
        place_std = 0.02 if spec.init == "normal" else self.POSITION_STD
        self.positions = position_table(spec, key, place_std)
        self.stack = Stack(spec, key=make("stack"))
        self.norm = norm(spec)
        self.head = Linear(spec.d_model, spec.num_outputs, key=make("head"), **options)

    def __call__(
        self,
        inputs,
        positions=None,
        segment_ids=None,
        key=None,
        *,
        dtype=jnp.float32,
        impl: str | None = None,
        remat: str = "none",
        unroll: int = 1,
    ) -> jax.Array:
        """Logits of the labels.

        Args:
          inputs: int [B, T] symbols, or float [B, T, V] vectors.
          positions: int [B, T] or [T]; None means 0, 1, ...
          segment_ids: int [B, T] or [T], or None.
          key: a PRNG key turns dropout on.
          dtype: of activations and matrix products.
          impl: what computes attention, see `kernels.dispatch`; None means the spec's.
          remat, unroll: as in `transformer.Stack`.

        Returns:
          [B, labels, classes] in float32 or wider: "tokens" labels each of T tokens, "sequence"
          has one label, read from the first token, and "choice" one label whose T classes are
          the tokens.
        """
        length = inputs.shape[1] + (self.spec.kind == "vit")
        positions = jnp.arange(length) if positions is None else positions
        positions = by_row(positions, (inputs.shape[0], length))
        outer, inner = (None, None) if key is None else jax.random.split(key)
        x = dropout(self.embed(inputs, positions, dtype), self.spec.dropout, outer)
        x, _ = self.stack(x, positions, segment_ids, inner, impl=impl, remat=remat, unroll=unroll)
        return self.logits(x)

    def embed(self, inputs, positions, dtype=jnp.float32) -> jax.Array:
        """Inputs as `__call__` takes them -> [B, T, D], with what positions add."""
        return add_positions(self.tokens(inputs, dtype), self.spec, self.positions, positions)

    def tokens(self, inputs, dtype) -> jax.Array:
        """Inputs -> [B, T, D], before positions."""
        if jnp.issubdtype(inputs.dtype, jnp.floating):
            return self.input(inputs.astype(dtype))
        x = tables.embed(self.input.weight[...], inputs).astype(dtype)  # of one-hot vectors
        return x if self.input.bias is None else wide_add(x, self.input.bias[...])

    def logits(self, x) -> jax.Array:
        """[B, T, D] -> [B, labels, classes] in float32 or wider."""
        x = rules.gather_sequence(x)[:, :1] if self.spec.output == "sequence" else x
        x = self.norm(x)
        y = rules.gather_columns(self.head(x.astype(jnp.promote_types(x.dtype, jnp.float32))))
        if self.spec.output == "tokens":
            return y
        y = rules.gather_sequence(y)  # one label: nothing to shard
        return y.swapaxes(1, 2) if self.spec.output == "choice" else y


class VisionTransformer(Encoder):
    """Patches of an image, float [B, P, numbers of a patch], to classes [B, 1, classes].

    The stack's T = P + 1 tokens start with a learned class token, zero at first, which the head
    reads.
    """

    POSITION_STD = 0.02

    def __init__(self, spec: ModelSpec, *, key):
        super().__init__(spec, key=key)
        self.class_token = nnx.Param(jnp.zeros(spec.d_model))

    def tokens(self, inputs, dtype) -> jax.Array:
        patches = super().tokens(inputs, dtype)
        room = jnp.pad(patches, ((0, 0), (1, 0), (0, 0)))
        is_class = (jnp.arange(room.shape[1]) == 0)[:, None]
        return jnp.where(is_class, self.class_token[...].astype(dtype), room)
