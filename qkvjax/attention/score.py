"""Score modifiers: what a layer does to S = q k^T / sqrt(H), in the order in which they stand.

    role_bias      S from q + b_q and k + b_k, a vector for each role and head
    role_gain      S from q * g_q and k * g_k, likewise; with RoPE only
    score_scale    s S
    column_bias    S_ij + c_j, a number for each key position
    score2d(m)     S_ij sum(w) + P_ij . w + b with the fixed features P_ij = [sincos_{m/2}(i);
                   sincos_{m-m/2}(j)] (Kayyam et al. 2026, the "+" of its tables)

The last three are affine: together S'_ij = a S_ij + r_i + c_j. Softmax does not see r_i, so
attention needs a, which folds into q, and c_j, one more column of the scores' dot product.
docs/explanations/scores.md says which of them break S = S^T, and which parameters are dead where.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from qkvjax.attention.layers import named_key, wide_add, wide_times
from qkvjax.attention.position import sincos
from qkvjax.attention.spec import AttentionSpec
from qkvjax.parallel import rules, tables

ROLES = ("q", "k")


class Score(nnx.Module):
    """The parameters of a layer's score modifiers, shared by its heads but for the roles' own.

    They start where they change nothing, but for two. score2d: w ~ N(0, 0.02^2), b = 0 (the
    paper). score_scale: 0, near which score2d's scale sum(w) starts; attention begins uniform.
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

    def on_role(self, role: str, state: jax.Array) -> jax.Array:
        """The state [B, T, N or K, H] of a role as it enters norm and rotation."""
        for name, _ in self.spec.modifiers:
            if name.startswith("role_"):
                own = self.params[f"{name}_{role}"][...]
                state = wide_add(state, own) if name == "role_bias" else wide_times(state, own)
        return state

    def spread_keys(self, num_heads: int) -> None:
        """Repeats and shards the numbers of the keys' heads, [K, H], as `rules.spread_heads` does
        the heads themselves."""
        for name in self.params:
            if name in ("role_bias_k", "role_gain_k"):
                heads = self.params[name][...][None, None]
                self.params[name] = nnx.Param(rules.spread_heads(heads, num_heads)[0, 0])

    def affine(self, positions: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """The factor a (scalar) and the columns c, [B, S] for key positions int [B, S].

        None where no modifier gives any; float32 or wider, as the parameters.
        """
        a, c = None, None
        add = lambda x, y: y if x is None else x + y  # noqa: E731
        times = lambda x, y: y if x is None else x * y  # noqa: E731
        for name, m in self.spec.modifiers:
            if name == "score_scale":
                factor, column = self.params["scale"][...], None
            elif name == "column_bias":
                factor = None
                column = tables.lookup(self.params["column"][...], positions)
            elif name == "score2d":
                mix = self.params["mix"][...]
                features = sincos(positions, m - m // 2).astype(mix.dtype)
                factor, column = jnp.sum(mix), jnp.sum(features * mix[m // 2 :], axis=-1)
            else:
                continue
            if factor is not None:
                a, c = times(a, factor), None if c is None else c * factor
            c = c if column is None else add(c, column)
        return a, c

    def modified(self, scores, q_positions, k_positions) -> jax.Array:
        """S' [B, N, T, S] from S, to the letter, with the rows that softmax does not see.

        Args:
          scores: [B, N, T, S].
          q_positions, k_positions: int [B, T] and [B, S].
        """
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
