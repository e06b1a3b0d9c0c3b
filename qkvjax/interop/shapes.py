"""A stranger's decoder in our words: its shapes and what they cost, no weights, no jax.

Letters: D model width, K key-value heads, H head width, L layers, E experts.
"""

from __future__ import annotations

import dataclasses

from qkvjax.attention.spec import AttentionSpec


@dataclasses.dataclass(frozen=True)
class Layer:
    """One block of a stranger's model.

    Attributes:
      attention: the variant; its `sharing` and `num_kv_heads` are what `plan` changes.
      dense_params: learned numbers outside attention and experts.
      dense_macs: multiply-adds a token costs there.
      num_experts: E; 0 for a dense layer.
      experts_per_token: how many of them one token uses.
      expert_params: learned numbers of one expert.
      expert_macs: multiply-adds a token costs in one expert.
      reuses_cache: whether K and V come from an earlier layer (`num_kv_shared_layers`).
    """

    attention: AttentionSpec
    dense_params: int
    dense_macs: int
    num_experts: int = 0
    experts_per_token: int = 0
    expert_params: int = 0
    expert_macs: int = 0
    reuses_cache: bool = False

    @property
    def _absent_width(self) -> int:
        """Width of the K and V projections that a layer with a borrowed cache lacks."""
        spec = self.attention
        blocks = sum("q" not in block for block in spec.blocks)
        return blocks * spec.num_kv_heads * spec.head_dim if self.reuses_cache else 0

    def params(self, experts: float) -> float:
        """Learned numbers with `experts` of the experts counted."""
        spec = self.attention
        absent = self._absent_width * spec.d_model
        if self.reuses_cache and spec.qk_norm:
            absent += spec.head_dim
        return spec.num_params - absent + self.dense_params + experts * self.expert_params

    def forward_macs(self, length: int) -> int:
        """Multiply-adds of one sequence, all length^2 pairs or the window's band counted."""
        spec = self.attention
        token = self.dense_macs + self.experts_per_token * self.expert_macs
        token -= self._absent_width * spec.d_model
        return spec.forward_macs(length) + length * token


@dataclasses.dataclass(frozen=True)
class Model:
    """A stranger's decoder.

    Attributes:
      model_type: as the file says.
      layers: one a block.
      table_params: tables of which a token reads one row.
      other_params: what every token reads besides the layers: the head (or the tied table)
        and the last norm.
      other_macs: multiply-adds a token costs there.
      max_length: positions the model was made for; None where the file does not say.
      learned_positions: whether longer sequences are impossible.
      notes: what a reader must know about the counts, a sentence each.
    """

    model_type: str
    layers: tuple[Layer, ...]
    table_params: int
    other_params: int
    other_macs: int
    max_length: int | None
    learned_positions: bool
    notes: tuple[str, ...]

    @property
    def num_params(self) -> int:
        """Learned numbers of the model."""
        inside = sum(layer.params(layer.num_experts) for layer in self.layers)
        return self.table_params + self.other_params + inside

    @property
    def active_params(self) -> int:
        """The same, with only the experts that one token uses."""
        inside = sum(layer.params(layer.experts_per_token) for layer in self.layers)
        return self.table_params + self.other_params + inside

    def read_params(self, batch: int) -> float:
        """Learned numbers that one decoding step of `batch` sequences reads.

        Rows looked up in tables are left out; of E experts, k a token, uniform routing reads
        E (1 - (1 - k/E)^batch) on average.
        """
        total = float(self.other_params)
        for layer in self.layers:
            e, k = layer.num_experts, layer.experts_per_token
            total += layer.params(e * (1 - (1 - k / e) ** batch) if e else 0)
        return total

    def forward_macs(self, length: int) -> int:
        """Multiply-adds of one sequence: matrix products and attention, no lookups or norms."""
        inside = sum(layer.forward_macs(length) for layer in self.layers)
        return inside + length * self.other_macs

    def with_attention(self, specs: tuple[AttentionSpec, ...]) -> Model:
        """The same model with other attention layers."""
        layers = zip(self.layers, specs)
        return dataclasses.replace(
            self, layers=tuple(dataclasses.replace(layer, attention=s) for layer, s in layers)
        )
