"""Attention with any sharing of its projections: one module for the whole study.

The sharing enters in one place, `project`: a role's state comes from the projection of its
block. What follows is the same for all variants, in training and in decoding alike:

    x --project--> queries, entry --(cache)--> entry of all tokens --expand--> keys, values
                      |                                                            |
                      +--------------------- attention ----------------------------+
                                                 |
    y <------------------ finish ----------------+

An entry is what the cache stores for a token: keys and values (layout "kv"), or the one
tensor that serves as both (layout "shared").

Letters: B sequences, T positions, S key positions, D model width, N query heads, K key-value heads,
H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qkvjax.attention.layers import Linear, RMSNorm, named_key, wide_times
from qkvjax.attention.position import by_row, rotate
from qkvjax.attention.score import Score
from qkvjax.attention.spec import AttentionSpec
from qkvjax.errors import UserError
from qkvjax.kernels import dispatch
from qkvjax.kernels.stored import KeyOfState, Stored
from qkvjax.parallel import rules

# Of new tokens, [B, T, K, H] each: {"k", "v"} in layout "kv", {"kv"} in layout "shared".
Entry = dict[str, jax.Array]
# The same names, as a cache stores them: `attention.cache`.
Cache = dict[str, Stored]


class Attention(nnx.Module):
    """One attention layer, [B, T, D] -> [B, T, D].

    Args:
      spec: the variant.
      key: a PRNG key.
      std: of the projections' initial values; None means 1/sqrt(fan in).
      out_std: the same for the output projection.
    """

    def __init__(self, spec: AttentionSpec, *, key, std=None, out_std=None):
        self.spec = spec
        # One parameter per block of the partition: a tie is structure, not a copy.
        self.projections = nnx.Dict(
            {
                "".join(block): Linear(
                    spec.d_model,
                    spec.num_role_heads(block[0]) * spec.head_dim,
                    key=named_key(key, block[0]),
                    std=std,
                    bias=spec.use_bias,
                )
                for block in spec.blocks
            }
        )
        self.output = Linear(
            spec.num_heads * spec.head_dim,
            spec.d_model,
            key=named_key(key, "output"),
            std=out_std,
            bias=spec.use_bias,
        )
        normed = {"".join(spec.block(role)) for role in "qk"} if spec.qk_norm else ()
        self.norms = nnx.Dict({name: RMSNorm(spec.head_dim) for name in sorted(normed)})
        self.score = Score(spec, key=named_key(key, "score")) if spec.score else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "*rows T"],
        segment_ids: Int[Array, "*rows T"] | None = None,
        *,
        impl: str | None = None,
    ) -> Float[Array, "B T D"]:
        """Computes attention of whole sequences.

        Args:
          x: [B, T, D].
          positions: int [B, T], restarting with each document; or [T], the same for each row.
          segment_ids: int [B, T] or [T], documents of a packed sequence, or None.
          impl: what computes it, see `kernels.dispatch`; None means the spec's.

        Raises:
          UserError: shapes that do not fit together.
        """
        if x.ndim != 3 or x.shape[-1] != self.spec.d_model:
            raise UserError(
                f"x of shape {list(x.shape)} is not [B, T, D] with D = d_model ="
                f" {self.spec.d_model}: one sequence is x[None]"
            )
        positions = by_row(positions, x.shape[:2])
        if segment_ids is not None:
            segment_ids = by_row(segment_ids, x.shape[:2], "segment_ids")
        q, entry = self.project(x, positions)
        # Where a mesh shards positions, every device needs the keys of all of them.
        entry = jax.tree.map(rules.gather_sequence, entry)
        key_positions = rules.gather_sequence(positions)
        k, v = self.expand(entry, key_positions)
        if self.spec.queries_are_keys and not rules.shards_sequence():
            k = None
        out = dispatch.attention(
            q,
            k,
            v,
            causal=self.spec.causal,
            window=self.spec.window,
            segment_ids=segment_ids,
            impl=impl or self.spec.implementation,
            **self.columns(q, key_positions),
        )
        return self.finish(out, positions)

    # ---- the three steps ----------------------------------------------------------------------

    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], layout: str | None = None
    ) -> tuple[Float[Array, "B T N H"], Entry]:
        """Returns the queries [B, T, N, H] and the entry of these tokens in a cache.

        Args:
          layout: of the cache; None means the smallest one.
        """
        spec = self.spec
        states = {name: project(x) for name, project in self.projections.items()}
        state = {
            role: rules.split_heads(states["".join(spec.block(role))], spec.num_role_heads(role))
            for role in "qkv"
        }
        scored_query = self._scored("q", state["q"], positions)
        factor = None if self.score is None else self.score.affine(positions)[0]
        q = scored_query if factor is None else wide_times(scored_query, factor)
        raw = spec.rotary_values == "raw"
        if spec.check_layout(layout) == "shared":
            return q, {"kv": state["k"] if raw else self._scored("k", state["k"], positions)}
        k = self._scored("k", state["k"], positions)
        # A value that is not raw is the rotated state of the role it shares with.
        rotated = k if spec.shares_kv else scored_query
        return q, {"k": k, "v": state["v"] if raw else rotated}

    def expand(
        self, entry: Entry, positions: Int[Array, "#B S"]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"] | None]:
        """Returns keys and values from entries; values None where the keys are the values.

        Args:
          positions: of the entries; a row for all sequences, or one for each.
        """
        if "kv" not in entry:
            return entry["k"], entry["v"]
        shared = entry["kv"]
        if self.spec.values_are_keys:
            return shared, None
        return self._scored("k", shared, positions), shared

    def finish(
        self, out: Float[Array, "B T N H"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Returns the layer's output from attention's output."""
        if self.spec.rotary_values == "unrotated_output":
            out = self._rotate(out, positions, inverse=True)
        return self.output(rules.merge_heads(out))

    # ---- what attention needs beside queries, keys and values ---------------------------------

    def key_of_state(self) -> KeyOfState | None:
        """Returns how a kernel makes a key from the shared state while it reads a cache.

        None where the key is the state, and where a kernel cannot make it. Then keys come from
        `expand`.
        """
        spec = self.spec
        # A subclass may make its keys in its own way, which no kernel knows.
        if type(self) is not Attention or spec.values_are_keys or spec.modifies_roles:
            return None
        norm = self.norms["".join(spec.block("k"))] if spec.qk_norm else None
        gain = None if norm is None else norm.gain[...]
        return KeyOfState(spec.rotary_base, spec.rotary_dim, gain)

    def columns(
        self,
        q: Float[Array, "B T N H"],
        positions: Int[Array, "#B S"],
        num_kv_heads: int | None = None,
    ) -> dict[str, jax.Array]:
        """Returns what score modifiers add for each key: `q_pe` and `k_pe` of the attention op.

        The dict is empty where they add nothing.

        Args:
          q: the queries, for their shape.
          positions: of the keys.
          num_kv_heads: heads of the keys; None means the layer's.
        """
        column = None if self.score is None else self.score.affine(positions)[1]
        if column is None:
            return {}
        unscaled = q.shape[-1] ** 0.5  # the op divides by it
        shape = (q.shape[0], positions.shape[1], num_kv_heads or self.spec.num_kv_heads, 1)
        k_pe = jnp.broadcast_to(column[:, :, None, None], shape)
        return {"q_pe": unscaled * jnp.ones_like(q[..., :1]), "k_pe": k_pe.astype(q.dtype)}

    def with_spread_heads(self) -> Attention:
        """Returns the layer with what belongs to a key's head repeated and sharded as the heads of
        a cache are (`rules.spread_heads`)."""
        if self.score is None or not rules.has_mesh():
            return self
        layer = jax.tree.map(lambda leaf: leaf, self)  # a copy of the module, of the same arrays
        layer.score.spread_keys(self.spec.num_heads)
        return layer

    # ---- from a state to what enters the scores -----------------------------------------------

    def _scored(self, role: str, state, positions):
        """Returns the state of a role as it enters the scores.

        With its role's score modifiers, normed, rotated.
        """
        if self.score is not None:
            state = self.score.on_role(role, state)
        if self.spec.qk_norm:
            state = self.norms["".join(self.spec.block(role))](state)
        return self._rotate(state, positions) if self.spec.rope else state

    def _rotate(self, x, positions, inverse: bool = False):
        spec = self.spec
        return rotate(x, positions, base=spec.rotary_base, width=spec.rotary_dim, inverse=inverse)


# The layer that a spec stands for. A variant of one's own is a subclass of AttentionSpec, a
# subclass of Attention and an entry here: docs/tutorials/your_variant.md shows one.
LAYERS: dict[type[AttentionSpec], type[Attention]] = {AttentionSpec: Attention}
