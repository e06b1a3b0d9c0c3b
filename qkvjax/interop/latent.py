"""Multi-head latent attention of a published model: its shapes and costs, no jax.

Keys and values of all heads are read from one latent a token (DeepSeek-V2, arXiv 2405.04434), so
an engine caches that latent and the one rotary key that all heads share.

Letters: D model width, N query heads, R width of the latent, H head width.
"""

from __future__ import annotations

import dataclasses

from qkvjax.attention.spec import itemsize


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """One layer of latent attention, with the names that `AttentionSpec` has where both mean one.

    Attributes:
      d_model: D.
      num_heads: N.
      kv_rank: R, numbers of the latent that a token leaves in the cache.
      query_rank: width of the queries' latent; None where queries are projected at once.
      rope_dim: H of the rotary part, one key of which is cached for all heads.
      nope_dim: H of the part of queries and keys without position.
      value_dim: H of a value.
      use_bias: biases on the maps from D to latents and on the output projection.
      index_heads: heads of an indexer that picks the tokens to read; 0 without one.
      index_dim: numbers of an indexer's key, cached beside the latent.
      index_topk: tokens that the indexer leaves to read.
    """

    d_model: int
    num_heads: int
    kv_rank: int
    query_rank: int | None
    rope_dim: int
    nope_dim: int
    value_dim: int
    use_bias: bool = False
    index_heads: int = 0
    index_dim: int = 0
    index_topk: int | None = None

    # What `plan` asks of every layer. Absorbed into the queries, the latent is the one key and
    # value of all heads; there is nothing left to tie.
    sharing = "latent"
    num_kv_heads = 1
    window = None
    shares_kv = False
    rope = True
    cache_layout = "latent"

    @property
    def head_dim(self) -> int:
        """Numbers of the one cached key."""
        return self.kv_rank + self.rope_dim

    @property
    def matrix_params(self) -> int:
        """Learned numbers of the matrices."""
        query_width = self.num_heads * (self.nope_dim + self.rope_dim)
        total = self.d_model * self.head_dim
        total += self.kv_rank * self.num_heads * (self.nope_dim + self.value_dim)
        total += self.num_heads * self.value_dim * self.d_model
        if self.query_rank is None:
            total += self.d_model * query_width
        else:
            total += self.query_rank * (self.d_model + query_width)
            total += self.query_rank * self.index_heads * self.index_dim
        total += self.d_model * (self.index_dim + self.index_heads)
        return total

    @property
    def num_params(self) -> int:
        """Learned numbers of the layer: matrices, biases, norms of the latents."""
        total = self.matrix_params + self.kv_rank
        if self.query_rank is not None:
            total += self.query_rank
        if self.use_bias:
            total += (self.query_rank or 0) + self.head_dim + self.d_model
        return total + 2 * self.index_dim

    def forward_macs(self, length: int) -> int:
        """Multiply-adds of one sequence of `length` tokens, with keys and values written out.

        Scores and values count all length^2 pairs, or those that an indexer leaves.
        """
        band = length if self.index_topk is None else min(length, self.index_topk)
        width = self.nope_dim + self.rope_dim + self.value_dim
        pairs = length * band * self.num_heads * width
        pairs += length * length * self.index_heads * self.index_dim
        return length * self.matrix_params + pairs

    def cache_bytes_per_token(self, dtype="bfloat16", layout: str | None = None) -> int:
        """Bytes the decode cache of this layer holds for each token; `layout` changes nothing."""
        size = itemsize(dtype)
        scale = 2 if size == 1 else 0  # int8 has one in bfloat16 for each tensor
        index = self.index_dim * size + scale if self.index_dim else 0
        return self.head_dim * size + scale + index

    def reads(self, dtype: str) -> list[tuple[int, int | None]]:
        """Bytes a token and the most tokens that one step reads of, for each cached tensor."""
        whole = self.cache_bytes_per_token(dtype)
        size = itemsize(dtype)
        scale = 2 if size == 1 else 0
        latent = self.head_dim * size + scale
        entries = [(latent, self.index_topk)]
        if whole > latent:
            entries.append((whole - latent, None))
        return entries
