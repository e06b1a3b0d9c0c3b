"""The bidirectional encoder and the vision transformer: sequences in, labels out."""

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

    # Standard deviation of learned positions at the start, where the spec does not set one.
    POSITION_STD = 1.0

    def __init__(self, spec: ModelSpec, *, key):
        def linear(name, inputs, outputs):
            std = STD[spec.init]
            return Linear(inputs, outputs, key=named_key(key, name), std=std, bias=spec.use_bias)

        position_std = 0.02 if spec.init == "normal" else self.POSITION_STD
        self.spec = spec
        self.input = linear("input", spec.vocab_size, spec.d_model)
        self.positions = position_table(spec, key, position_std)
        self.stack = Stack(spec, key=named_key(key, "stack"))
        self.norm = norm(spec)
        self.head = linear("head", spec.d_model, spec.num_outputs)

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
        """Returns the logits of the labels.

        Args:
          inputs: int [B, T] symbols, or float [B, T, V] vectors.
          positions: int [B, T] or [T]; None means 0, 1, ...
          segment_ids: int [B, T] or [T], or None.
          key: a PRNG key turns dropout on.
          dtype: of activations and matrix products.
          impl: which implementation computes attention, see `kernels.dispatch`; None means the
            spec's.
          remat, unroll: as in `transformer.Stack`.

        Returns:
          [B, labels, classes] in float32 or wider: "tokens" labels each of T tokens, "sequence"
          has one label, read from the first token, and "choice" one label whose T classes are
          the tokens.
        """
        length = inputs.shape[1] + (self.spec.kind == "vit")
        positions = jnp.arange(length) if positions is None else positions
        positions = by_row(positions, (inputs.shape[0], length))
        input_key, stack_key = (None, None) if key is None else jax.random.split(key)
        x = dropout(self.embed(inputs, positions, dtype), self.spec.dropout, input_key)
        x, _ = self.stack(
            x, positions, segment_ids, stack_key, impl=impl, remat=remat, unroll=unroll
        )
        return self.logits(x)

    def embed(self, inputs, positions, dtype=jnp.float32) -> jax.Array:
        """Returns what the first block reads, [B, T, D]: inputs with what positions add."""
        return add_positions(self.tokens(inputs, dtype), self.spec, self.positions, positions)

    def tokens(self, inputs, dtype) -> jax.Array:
        """Returns the embedded inputs, [B, T, D], before positions."""
        if jnp.issubdtype(inputs.dtype, jnp.floating):
            return self.input(inputs.astype(dtype))
        # A one-hot vector times the matrix is one of its rows.
        x = tables.embed(self.input.weight[...], inputs).astype(dtype)
        return x if self.input.bias is None else wide_add(x, self.input.bias[...])

    def logits(self, x) -> jax.Array:
        """Returns the logits [B, labels, classes] in float32 or wider of x [B, T, D]."""
        output = self.spec.output
        if output == "sequence":
            x = rules.gather_sequence(x)[:, :1]
        x = self.norm(x)
        y = rules.gather_columns(self.head(x.astype(jnp.promote_types(x.dtype, jnp.float32))))
        if output == "tokens":
            return y
        y = rules.gather_sequence(y)  # one label: nothing to shard
        return y.swapaxes(1, 2) if output == "choice" else y


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
        """Returns the class token and the embedded patches, [B, P + 1, D], before positions."""
        patches = super().tokens(inputs, dtype)
        padded = jnp.pad(patches, ((0, 0), (1, 0), (0, 0)))
        is_class = (jnp.arange(padded.shape[1]) == 0)[:, None]
        return jnp.where(is_class, self.class_token[...].astype(dtype), padded)
