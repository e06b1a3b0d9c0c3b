"""Score modifiers: what a layer does to S = q k^T / sqrt(H), in the order in which they stand.

    role_bias      S from q + b_q and k + b_k, a vector for each role and head
    role_gain      S from q * g_q and k * g_k, likewise; with RoPE only
    score_scale    s S
    column_bias    S_ij + c_j, a number for each key position
    score2d(m)     S_ij sum(w) + P_ij . w + b with the fixed features P_ij = [sincos_{m/2}(i);
                   sincos_{m-m/2}(j)] (Kayyam et al. 2026, the "+" of its tables)

The last three are affine: together S'_ij = a S_ij + r_i + c_j. Softmax does not see r_i. So
attention needs a, which is multiplied into q, and c_j, one more column of the scores' dot product.
docs/explanations/scores.md says which of them break S = S^T, and which parameters are dead where.

Letters: B sequences, T query positions, S key positions, N query heads, K key-value heads, H head
width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qkvjax.attention.layers import named_key, wide_add, wide_times
from qkvjax.attention.position import sincos
from qkvjax.attention.spec import AttentionSpec
from qkvjax.parallel import rules, tables

ROLES = ("q", "k")


class Score(nnx.Module):
    """The parameters of a layer's score modifiers.

    All heads share them, except those of role_bias and role_gain. They start where they change
    nothing, with two exceptions. score2d: w ~ N(0, 0.02^2), b = 0 (the paper). score_scale: 0, near
    which score2d's scale sum(w) starts; attention begins uniform.
    """

    def __init__(self, spec: AttentionSpec, *, key):
        self.spec = spec
        params = {}
        for name, m in spec.modifiers:
            if name == "score2d":
                params["mix"] = 0.02 * jax.random.normal(named_key(key, "score2d"), (m,))
                params["offset"] = jnp.zeros(())
            elif name == "score_scale":
                params["scale"] = jnp.zeros(())
            elif name == "column_bias":
                params["column"] = jnp.zeros(spec.max_length)
            else:
                start = jnp.zeros if name == "role_bias" else jnp.ones
                for role in ROLES:
                    shape = (spec.num_role_heads(role), spec.head_dim)
                    params[f"{name}_{role}"] = start(shape)
        self.params = nnx.Dict({name: nnx.Param(value) for name, value in params.items()})

    def on_role(self, role: str, state: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Returns the state of a role, "q" or "k", as it enters norm and rotation."""
        for name, _ in self.spec.modifiers:
            if name.startswith("role_"):
                numbers = self.params[f"{name}_{role}"][...]
                modify = wide_add if name == "role_bias" else wide_times
                state = modify(state, numbers)
        return state

    def spread_keys(self, num_heads: int) -> None:
        """Repeats and shards the numbers of the keys' heads, [K, H], as `rules.spread_heads` does
        the heads themselves."""
        for name in self.params:
            if name in ("role_bias_k", "role_gain_k"):
                heads = self.params[name][...][None, None]
                self.params[name] = nnx.Param(rules.spread_heads(heads, num_heads)[0, 0])

    def affine(
        self, positions: Int[Array, "B S"]
    ) -> tuple[Float[Array, ""] | None, Float[Array, "B S"] | None]:
        """Returns the factor a and the columns c of the keys at these positions.

        None where no modifier gives any; float32 or wider, as the parameters.
        """
        a = c = None
        for name, m in self.spec.modifiers:
            factor, column = self._factor_and_column(name, m, positions)
            if factor is not None:
                a = factor if a is None else a * factor
                c = None if c is None else c * factor  # of the modifiers before this one
            if column is not None:
                c = column if c is None else c + column
        return a, c

    def _factor_and_column(self, name: str, m: int, positions):
        """Returns what one modifier multiplies the scores with, and what it adds for each key."""
        if name == "score_scale":
            return self.params["scale"][...], None
        if name == "column_bias":
            return None, tables.lookup(self.params["column"][...], positions)
        if name == "score2d":
            mix = self.params["mix"][...]
            features = sincos(positions, m - m // 2).astype(mix.dtype)
            return jnp.sum(mix), jnp.sum(features * mix[m // 2 :], axis=-1)
        return None, None  # of the roles, not of the scores

    def modified(
        self,
        scores: Float[Array, "B N T S"],
        q_positions: Int[Array, "B T"],
        k_positions: Int[Array, "B S"],
    ) -> Float[Array, "B N T S"]:
        """Returns S' from S, to the letter, with the terms r_i that softmax does not see."""
        for name, m in self.spec.modifiers:
            if name == "score_scale":
                scores = scores * self.params["scale"][...]
            elif name == "column_bias":
                scores = scores + self.params["column"][...][k_positions][:, None, None, :]
            elif name == "score2d":
                mix = self.params["mix"][...]
                rows = sincos(q_positions, m // 2) @ mix[: m // 2]
                columns = sincos(k_positions, m - m // 2) @ mix[m // 2 :]
                table = rows[:, None, :, None] + columns[:, None, None, :]
                scores = scores * jnp.sum(mix) + table + self.params["offset"][...]
        return scores
