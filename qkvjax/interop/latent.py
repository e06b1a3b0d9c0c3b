"""Multi-head latent attention of a published model: its shapes and costs, without jax.

The keys and values of all heads are linear maps of one latent per token (DeepSeek-V2, arXiv
2405.04434). An engine caches that latent and one rotary key, which all heads share.

Letters: D model width, N query heads, R width of the latent, H head width.
"""

from __future__ import annotations

import dataclasses

from qkvjax.attention.spec import itemsize


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """One layer of latent attention. Names are those of `AttentionSpec` where both have a thing.

    Attributes:
      d_model: D.
      num_heads: N.
      kv_rank: R, width of the latent that each token leaves in the cache.
      query_rank: width of the latent of the queries; None if they are projected directly.
      rope_dim: width of the rotary part of queries and keys; its key is cached once for all heads.
      nope_dim: width of the part of queries and keys without position.
      value_dim: width of a value.
      use_bias: whether the maps from D to latents and the output projection have biases.
      index_heads: heads of the indexer that picks the tokens to read; 0 without an indexer.
      index_dim: width of the indexer's key, which is cached beside the latent.
      index_topk: number of tokens that the indexer picks.
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

    # `plan` reads these of every layer. With its maps absorbed into queries and output, the latent
    # is the only key and the only value of all heads, so there is nothing left to tie.
    sharing = "latent"
    num_kv_heads = 1
    window = None
    shares_kv = False
    rope = True
    cache_layout = "latent"

    @property
    def head_dim(self) -> int:
        """Width of the one cached key: latent and rotary part."""
        return self.kv_rank + self.rope_dim

    @property
    def matrix_params(self) -> int:
        """Learned numbers of the matrices."""
        query_width = self.num_heads * (self.nope_dim + self.rope_dim)
        to_latent = self.d_model * self.head_dim
        from_latent = self.kv_rank * self.num_heads * (self.nope_dim + self.value_dim)
        output = self.num_heads * self.value_dim * self.d_model
        if self.query_rank is None:
            queries = self.d_model * query_width
        else:
            queries = self.query_rank * (self.d_model + query_width)
        indexer = self.d_model * (self.index_dim + self.index_heads)
        if self.query_rank is not None:
            indexer += self.query_rank * self.index_heads * self.index_dim
        return to_latent + from_latent + output + queries + indexer

    @property
    def num_params(self) -> int:
        """Learned numbers of the layer: matrices, biases and the norms of the latents."""
        total = self.matrix_params + self.kv_rank
        if self.query_rank is not None:
            total += self.query_rank
        if self.use_bias:
            total += (self.query_rank or 0) + self.head_dim + self.d_model
        return total + 2 * self.index_dim

    def forward_macs(self, length: int) -> int:
        """Multiply-adds of one sequence of `length` tokens, with keys and values made explicitly.

        Scores and values count all length^2 pairs, or the pairs that an indexer picks.
        """
        read = length if self.index_topk is None else min(length, self.index_topk)
        width = self.nope_dim + self.rope_dim + self.value_dim
        attention = length * read * self.num_heads * width
        indexer = length * length * self.index_heads * self.index_dim
        return length * self.matrix_params + attention + indexer

    def cache_bytes_per_token(self, dtype="bfloat16", layout: str | None = None) -> int:
        """Bytes per token in the decode cache of this layer; `layout` changes nothing."""
        latent = _cached_bytes(self.head_dim, dtype)
        return latent + _cached_bytes(self.index_dim, dtype)

    def reads(self, dtype: str) -> list[tuple[int, int | None]]:
        """Returns what one decoding step reads of each cached tensor.

        A pair for each: bytes per token, and the most tokens that are read (None means all).
        """
        tensors = [(_cached_bytes(self.head_dim, dtype), self.index_topk)]
        if self.index_dim:
            tensors.append((_cached_bytes(self.index_dim, dtype), None))
        return tensors


def _cached_bytes(width: int, dtype: str) -> int:
    """Returns the bytes of one token in a cached tensor; in int8 with its scale in bfloat16."""
    if width == 0:
        return 0
    size = itemsize(dtype)
    scale = 2 if size == 1 else 0
    return width * size + scale
