"""The decoder-only language model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from qkvjax.attention.layers import Linear, named_key
from qkvjax.attention.position import by_row
from qkvjax.errors import UserError
from qkvjax.models.spec import ModelSpec
from qkvjax.models.transformer import Stack, add_positions, dropout, norm, position_table
from qkvjax.parallel import rules, tables
from qkvjax.parallel.products import matmul


class LanguageModel(nnx.Module):
    """Token ids to logits, causal.

    A plain pytree: give it to `jax.jit`, `jax.value_and_grad` and optax as it is. Every leaf
    is learned; `spec` says everything else.

    Args:
      spec: what to build.
      key: a PRNG key; initial values depend on it and on each parameter's name.
    """

    def __init__(self, spec: ModelSpec, *, key):
        self.spec = spec
        # Rows of unit expected norm, because they may also be the head. "normal" is GPT-2's 0.02,
        # as in the paper's models.
        std = 0.02 if spec.init == "normal" else spec.d_model**-0.5
        shape = (spec.vocab_size, spec.d_model)
        self.embedding = nnx.Param(std * jax.random.normal(named_key(key, "embedding"), shape))
        self.positions = position_table(spec, key, std)
        self.stack = Stack(spec, key=named_key(key, "stack"))
        self.norm = norm(spec)
        head = None
        if not spec.tie_embeddings:
            head = Linear(spec.d_model, spec.vocab_size, key=named_key(key, "head"), std=std)
        self.head = head

    def __call__(
        self,
        inputs,
        positions=None,
        segment_ids=None,
        key=None,
        *,
        dtype=jnp.float32,
        impl: str | None = None,
    ) -> jax.Array:
        """Returns the logits of the next token.

        Args:
          inputs: int [B, T] token ids.
          positions: int [B, T] or [T]; None means 0, 1, ...
          segment_ids: int [B, T] documents of packed sequences, or None.
          key: a PRNG key turns dropout on.
          dtype: of activations and matrix products.
          impl: which implementation computes attention, see `kernels.dispatch`; None means the
            spec's.

        Returns:
          [B, T, num_ids] in float32 or wider: one logit for each id of the tokenizer. The method
          `logits` also returns the columns that pad the vocabulary; the training loss counts them.

        Raises:
          UserError: T exceeds a learned table, or shapes do not fit together.
        """
        x, _ = self.hidden(inputs, positions, segment_ids, key, dtype=dtype, impl=impl)
        return self.logits(x)[..., : self.spec.num_ids]

    def hidden(
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
        table: jax.Array | None = None,
    ):
        """Returns what the head reads, and the losses and loads of routers.

        Args:
          inputs, positions, segment_ids, key, dtype, impl: as in `__call__`.
          remat, unroll: as in `transformer.Stack`.
          table: what `embedding_copies` returned; None means the embedding.

        Returns:
          (the output of the final norm, [B, T, D] in `dtype`; means over layers of what
          `moe.Experts` returns, or None without experts).

        Raises:
          UserError: T exceeds a learned table, or shapes do not fit together.
        """
        if jnp.ndim(inputs) != 2:
            raise UserError(
                f"ids of shape {list(jnp.shape(inputs))} are not [B, T]: one sequence is ids[None]"
            )
        positions = jnp.arange(inputs.shape[1]) if positions is None else positions
        positions = by_row(positions, inputs.shape)
        input_key, stack_key = (None, None) if key is None else jax.random.split(key)
        x = self.embed(inputs, positions, dtype, table)
        x = dropout(x, self.spec.dropout, input_key)
        x, routers = self.stack(
            x, positions, segment_ids, stack_key, impl=impl, remat=remat, unroll=unroll
        )
        return self.norm(x), routers

    def embed(self, inputs, positions, dtype=jnp.float32, table=None) -> jax.Array:
        """Returns what the first block reads, [B, T, D]: embedded ids plus positions.

        Args:
          inputs: int [B, T] token ids.
          positions: int [B, T].
          dtype: of the result.
          table: what `embedding_copies` returned; None means the embedding.
        """
        self.check_length(inputs.shape[1])
        # Cast after the lookup: the gradient sums over tokens, which bfloat16 cannot.
        table = self.embedding[...] if table is None else table
        x = tables.embed(table, inputs).astype(dtype)
        if self.spec.init != "normal":
            x = x * jnp.asarray(self.spec.d_model**0.5, dtype)  # unit variance into the stack
        return add_positions(x, self.spec, self.positions, positions)

    def embedding_copies(self) -> jax.Array:
        """Returns the embedding for a training step, as `tables.copies` where the head is tied.

        The gradients of the lookup and of the head then cross devices once, added up. [V, D] where
        the head has a matrix of its own, or on one device.
        """
        table = self.embedding[...]
        return table if self.head is not None else tables.copies(table)

    def head_matrix(self, table: jax.Array | None = None) -> jax.Array:
        """Returns the map from D to the vocabulary as it is learned, [D, V].

        Args:
          table: what `embedding_copies` returned; None means the embedding. Of copies [W, V, D] a
            tied head is [W, D, V].
        """
        if self.head is not None:
            return self.head.weight[...]
        table = self.embedding[...] if table is None else table
        return jnp.swapaxes(table, -2, -1)

    def logits(self, x) -> jax.Array:
        """Returns the logits [B, T, V] of x [B, T, D], the output of the final norm.

        The product is summed, and returned, in float32 or wider.
        """
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return rules.gather_columns(matmul(x, self.head_matrix(), wide))

    def check_length(self, length: int) -> None:
        """Raises UserError where a learned table or score modifiers end before `length` tokens."""
        if self.spec.bounded and length > self.spec.max_length:
            raise UserError(
                f"a sequence of {length} tokens exceeds the {self.spec.max_length} positions of"
                " the model's learned table or score modifiers: shorten it, or train with"
                " position='rope' and without 'column_bias' and 'score2d'"
            )
