"""What the `model_type` of a published file means beyond its keys: the form of a family.

The facts stand in `family_table`; they follow the public modelling code of `transformers`, and
of models that come with remote code.

Letters: D model width, N query heads, K key-value heads, H head width, F feed-forward width,
E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Experts:
    """Which keys describe the experts of a family, and what a block of experts has besides.

    Attributes:
      count: key of E.
      used: key of the experts that one token uses.
      width: key of F of an expert.
      dense_width: key of F of a layer without experts.
      layers: which layers have experts: "all", "step" (`decoder_sparse_step`,
        `mlp_only_layers`), "first" (all after `first_k_dense_replace`), "listed" (`moe_layers`,
        `interleave_moe_layer_step`) or "range" (`moe_layer_start_index` and so on). A file's
        `mlp_layer_types` decides before all of these.
      shared_width: key of F of an expert that every token uses.
      shared_count: key of the number of such experts of an expert's F.
      shared_gate: a gate of D numbers for the shared expert.
      router_bias: one learned number an expert beside the router's matrix.
      biased: experts with biases.
      norms: norms of width D that only layers with experts have.
      router_scales: D + E learned scales of the router (Gemma 4).
      beside_dense: whether the dense feed-forward stands beside the experts (Gemma 4).
    """

    count: str = "num_experts"
    used: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    dense_width: str = "intermediate_size"
    layers: str = "all"
    shared_width: str = ""
    shared_count: str = ""
    shared_gate: bool = False
    router_bias: bool = False
    biased: bool = False
    norms: int = 0
    router_scales: bool = False
    beside_dense: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture. A `bool | str` is a yes, a no, or the key of the file that says which.

    Attributes:
      names: the file's names of a key, in the order in which they are looked for.
      defaults: of the configuration class, for keys that published files leave out.
      standard: rewrites the file's values into standard keys, where names are not enough.
      latent: whether attention is multi-head latent attention.
      grouped: whether the file's `num_key_value_heads` counts; else K = N.
      gated: three feed-forward matrices instead of two.
      qkv_bias, out_bias, mlp_bias, head_bias: biases of the projections to queries, keys and
        values, of the output projection, of the feed-forward, of the output head.
      qk_norm: a norm with one gain of H numbers for all query heads and one for all key heads.
      wide_qk_norm: the same with gains of N H and K H numbers.
      qk_norm_bias: that norm has a bias too.
      norms: norms of width D in a block; `parallel` is a key that makes it one fewer.
      norm_numbers: learned numbers a channel of such a norm: 1, 2 with a bias, 0 without gain.
      final_norm: a norm before the output head.
      embedding_norm: a norm after the embedding.
      tied: whether head and embedding are one table when the file does not say.
      positions: None, or how many rows the table of learned positions has beyond the maximum.
      rope: whether queries and keys are rotated.
      windows: which layers `sliding_window` binds when the file has no `layer_types`: "none",
        "all", "qwen" (behind `use_sliding_window`), "late" (from `max_window_layers` on),
        "pattern" (all but every n-th), "no_rope" (layers without RoPE) or "chunked" (layers
        with RoPE, by `attention_chunk_size`).
      feed_forward_times: F / D where the file has no F.
      experts: None for a family without.
      sinks: a learned number a query head.
      per_layer_inputs: an embedding of every layer (`hidden_size_per_layer_input`).
      wide_globals: layers without a window have `global_head_dim`, and K = V where
        `attention_k_eq_v` says so (Gemma 4).
      attention_gate: a matrix [D, N H] that gates the output of attention.
      sub_norms: norms before the output projection and before the last feed-forward matrix.
      activation_params: learned numbers of the activation function.
      kinds: what is special in this family and is counted, of `recognise.KINDS`.
      classes: names of its model class, besides that made of the `model_type`.
    """

    names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    defaults: Mapping = dataclasses.field(default_factory=dict)
    standard: Callable[[Mapping], Mapping] | None = None
    latent: bool = False
    grouped: bool = True
    gated: bool = True
    qkv_bias: bool | str = "attention_bias"
    out_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    head_bias: bool | str = False
    qk_norm: bool | str = False
    wide_qk_norm: bool | str = False
    qk_norm_bias: bool = False
    norms: int = 2
    parallel: str = ""
    norm_numbers: int = 1
    final_norm: bool | str = True
    embedding_norm: bool = False
    tied: bool = False
    positions: int | None = None
    rope: bool | str = True
    windows: str = "none"
    feed_forward_times: int | None = None
    experts: Experts | None = None
    sinks: bool = False
    per_layer_inputs: bool = False
    wide_globals: bool = False
    attention_gate: bool = False
    sub_norms: bool = False
    activation_params: int = 0
    kinds: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
