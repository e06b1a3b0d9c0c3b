"""A published decoder by its shapes, and what they cost; without weights and without jax.

Letters: D model width, N query heads, K key-value heads, H head width, L layers, E experts.
"""

from __future__ import annotations

import dataclasses

from qkvjax.attention.spec import AttentionSpec
from qkvjax.interop.latent import LatentSpec
from qkvjax.interop.quantization import Quantization, Widths

Spec = AttentionSpec | LatentSpec


def matrix_params(spec: Spec) -> int:
    """Returns the learned numbers of the matrices of an attention layer."""
    if isinstance(spec, LatentSpec):
        return spec.matrix_params
    return dataclasses.replace(spec, use_bias=False, qk_norm=False).num_params


def cache_reads(spec: Spec, dtype: str, layout: str | None) -> list[tuple[int, int | None]]:
    """Returns what a decoding step reads of a layer's cache.

    A pair for each cached tensor: bytes per token, and the most tokens that are read (None means
    all).

    Args:
      spec: the attention of the layer.
      dtype: of the cache.
      layout: of the cache, "kv" or "shared"; None means that of the sharing.
    """
    if isinstance(spec, LatentSpec):
        return spec.reads(dtype)
    return [(spec.cache_bytes_per_token(dtype, layout), spec.window)]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One block of a published model.

    Attributes:
      attention: the variant; `plan` changes its `sharing` and `num_kv_heads`.
      dense_params: learned numbers outside attention and experts.
      dense_macs: multiply-adds per token outside attention and experts.
      ffn_macs: the part of `dense_macs` in the dense feed-forward.
      shared_macs: the part of `dense_macs` in experts that every token uses.
      num_experts: E; 0 for a dense layer.
      experts_per_token: how many of the experts one token uses.
      expert_params: learned numbers of one expert.
      expert_macs: multiply-adds per token in one expert.
      reuses_cache: whether K and V come from an earlier layer (`num_kv_shared_layers`).
      role_norm_params: learned numbers of a norm for all query heads together, and as many again
        for all key heads.
      head_norm_params: learned numbers of a norm for each query head and each key-value head.
      widths: bytes per number of each part in a quantised file; None if it is not quantised.
    """

    attention: Spec
    dense_params: int
    dense_macs: int
    ffn_macs: int = 0
    shared_macs: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_params: int = 0
    expert_macs: int = 0
    reuses_cache: bool = False
    role_norm_params: int = 0
    head_norm_params: int = 0
    widths: Widths | None = None

    @property
    def _absent_width(self) -> int:
        """Width of the K and V projections that a layer without a cache of its own lacks."""
        spec = self.attention
        if not self.reuses_cache:
            return 0
        blocks = sum("q" not in block for block in spec.blocks)
        return blocks * spec.num_kv_heads * spec.head_dim

    def _norms_beside(self) -> int:
        """Learned numbers of query and key norms that `AttentionSpec` does not count."""
        if not self.role_norm_params and not self.head_norm_params:
            return 0
        spec = self.attention
        tied = spec.block("q") == spec.block("k")
        roles = 1 if tied else 2
        heads = spec.num_heads if tied else spec.num_heads + spec.num_kv_heads
        return roles * self.role_norm_params + heads * self.head_norm_params

    def params(self, experts: float) -> float:
        """Learned numbers of the layer with `experts` of its experts, which may be a mean."""
        spec = self.attention
        absent = self._absent_width * spec.d_model
        if self.reuses_cache and spec.qk_norm:
            absent += spec.head_dim
        attention = spec.num_params - absent + self._norms_beside()
        return attention + self.dense_params + experts * self.expert_params

    def weight_bytes(self, experts: float, size: int | None) -> float:
        """Bytes of these numbers.

        Args:
          experts: how many experts to count.
          size: bytes per number; None means those of the quantised file.
        """
        if size is not None or self.widths is None:
            return self.params(experts) * (2 if size is None else size)
        widths = self.widths
        attention = matrix_params(self.attention) - self._absent_width * self.attention.d_model
        parts = (
            (attention, widths.attention),
            (self.ffn_macs, widths.feed_forward),
            (self.shared_macs, widths.shared),
            (experts * self.expert_macs, widths.experts),
        )
        narrow = sum(count for count, _ in parts)
        rest = self.params(experts) - narrow
        return rest * widths.rest + sum(count * width for count, width in parts)

    def forward_macs(self, length: int) -> int:
        """Multiply-adds of a sequence of `length` tokens, with all pairs inside the window."""
        spec = self.attention
        token = self.dense_macs + self.experts_per_token * self.expert_macs
        token -= self._absent_width * spec.d_model
        return spec.forward_macs(length) + length * token


@dataclasses.dataclass(frozen=True)
class Model:
    """A published decoder.

    Attributes:
      model_type: as the file has it.
      layers: every layer of the model.
      table_params: learned numbers of tables of which a token reads one row.
      other_params: learned numbers outside the layers that every token reads: the head (or the
        tied table) and the last norm.
      other_macs: multiply-adds per token outside the layers.
      max_length: positions that the model was made for; None if the file does not say.
      learned_positions: whether positions are a table, so that longer sequences are impossible.
      notes: sentences that a reader of the counts must know.
      estimate: why the counts are not exact; None if they are.
      part: which part is counted if the file describes more, such as a vision tower; else None.
      quantization: how the file stores the weights; None if it is not quantised.
      head_bytes: bytes per number of the output head, if it is not the embedding.
      head_params: learned numbers of that head; 0 if it is the embedding.
    """

    model_type: str
    layers: tuple[Layer, ...]
    table_params: int
    other_params: int
    other_macs: int
    max_length: int | None
    learned_positions: bool
    notes: tuple[str, ...]
    estimate: str | None = None
    part: str | None = None
    quantization: Quantization | None = None
    head_bytes: float = 2.0
    head_params: int = 0

    @property
    def exact(self) -> bool:
        """Whether parameters and cache are counted exactly, and not estimated."""
        return self.estimate is None

    @property
    def num_params(self) -> int:
        """Learned numbers of the model."""
        inside = sum(layer.params(layer.num_experts) for layer in self.layers)
        return self.table_params + self.other_params + inside

    @property
    def active_params(self) -> int:
        """Learned numbers of the model with only the experts that one token uses."""
        inside = sum(layer.params(layer.experts_per_token) for layer in self.layers)
        return self.table_params + self.other_params + inside

    def read_params(self, batch: int) -> float:
        """Learned numbers that one decoding step of `batch` sequences reads.

        Rows looked up in tables are left out; of E experts, k a token, uniform routing reads
        E (1 - (1 - k/E)^batch) on average.
        """
        inside = sum(layer.params(_experts_read(layer, batch)) for layer in self.layers)
        return float(self.other_params) + inside

    def weight_bytes(self, size: int | None) -> float:
        """Bytes of all weights with `size` bytes per number; None means as the file stores them."""
        inside = sum(layer.weight_bytes(layer.num_experts, size) for layer in self.layers)
        tables = self.table_params * (2 if size is None else size)
        return tables + self._other_bytes(size) + inside

    def read_bytes(self, batch: int, size: int | None) -> float:
        """Bytes of the weights that one decoding step of `batch` sequences reads."""
        inside = sum(layer.weight_bytes(_experts_read(layer, batch), size) for layer in self.layers)
        return self._other_bytes(size) + inside

    def _other_bytes(self, size: int | None) -> float:
        if size is not None:
            return self.other_params * size
        return 2 * (self.other_params - self.head_params) + self.head_bytes * self.head_params

    def forward_macs(self, length: int) -> int:
        """Multiply-adds of one sequence: matrix products and attention, no lookups or norms."""
        inside = sum(layer.forward_macs(length) for layer in self.layers)
        return inside + length * self.other_macs

    def with_attention(self, specs: tuple[Spec, ...]) -> Model:
        """Returns the same model with other attention, one spec per layer."""
        layers = zip(self.layers, specs)
        return dataclasses.replace(
            self, layers=tuple(dataclasses.replace(layer, attention=s) for layer, s in layers)
        )


def _experts_read(layer: Layer, batch: int) -> float:
    """Returns the mean number of experts that `batch` tokens use with uniform routing."""
    e = layer.num_experts
    return e * (1 - (1 - layer.experts_per_token / e) ** batch) if e else 0
