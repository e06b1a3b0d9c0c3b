"""The form of the entries in `family_table`: what a `model_type` implies that no key says.

The facts follow the public modelling code of `transformers` and of models with remote code.

Letters: D model width, N query heads, K key-value heads, H head width, F feed-forward width,
E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Experts:
    """Keys that describe the experts of a family, and what a layer with experts has besides.

    Attributes:
      count: key of E.
      used: key of the number of experts per token.
      width: key of F of an expert.
      dense_width: key of F of a layer without experts.
      layers: which layers have experts: "all", "step" (`decoder_sparse_step`,
        `mlp_only_layers`), "first" (all after `first_k_dense_replace`), "listed" (`moe_layers`,
        `interleave_moe_layer_step`) or "range" (`moe_layer_start_index` and so on). If a file has
        `mlp_layer_types`, that decides instead.
      shared_width: key of F of an expert that every token uses; "" if there is none.
      shared_count: key of the number of such experts, if each is as wide as the others.
      shared_gate: whether the shared expert has a gate of D numbers.
      router_bias: whether the router has a bias, one number per expert.
      biased: whether experts have biases.
      norms: number of norms of width D that only layers with experts have.
      router_scales: whether the router has D + E learned scales (Gemma 4).
      beside_dense: whether the layer has a dense feed-forward too (Gemma 4).
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
    """One architecture. A field `bool | str` is True, False, or the key of the file that decides.

    Attributes:
      names: standard key -> the names that files have for it, most important first.
      defaults: values of the configuration class for keys that files may leave out.
      standard: translates the values of a file into standard keys, if other names are not enough.
      latent: whether attention is multi-head latent attention.
      grouped: whether `num_key_value_heads` applies; if not, K = N.
      gated: whether the feed-forward has three matrices instead of two.
      qkv_bias: whether the projections to queries, keys and values have biases.
      out_bias: whether the output projection has a bias.
      mlp_bias: whether the feed-forward has biases.
      head_bias: whether the output head has a bias.
      qk_norm: whether queries and keys have norms with gains of H numbers each.
      wide_qk_norm: the same with gains of N H and K H numbers.
      qk_norm_bias: whether these norms have biases.
      norms: number of norms of width D in a layer.
      parallel: key of the switch for parallel attention and feed-forward, which is one norm fewer.
      norm_numbers: learned numbers per channel of a norm: 1, 2 with a bias, 0 without gain.
      final_norm: whether there is a norm before the output head.
      embedding_norm: whether there is a norm after the embedding.
      tied: whether head and embedding are one table if the file does not say.
      positions: extra rows of the table of learned positions; None if there is no table.
      rope: whether queries and keys are rotated.
      windows: which layers `sliding_window` applies to if the file has no `layer_types`: "none",
        "all", "qwen" (the same as "late", if `use_sliding_window`), "late" (from
        `max_window_layers` on), "pattern" (all but every n-th), "no_rope" (layers without RoPE) or
        "chunked" (layers with RoPE, with `attention_chunk_size`).
      feed_forward_times: F / D if the file has no F.
      experts: None for a family without experts.
      sinks: whether each query head has a learned sink.
      per_layer_inputs: whether each layer has an embedding (`hidden_size_per_layer_input`).
      wide_globals: whether layers without a window have `global_head_dim`, and K = V if
        `attention_k_eq_v` is true (Gemma 4).
      attention_gate: whether a matrix [D, N H] gates the output of attention.
      sub_norms: whether there are norms before the output projection and before the last
        feed-forward matrix.
      activation_params: number of learned numbers of the activation function.
      kinds: names of entries of `recognise.KINDS` that this family is counted with.
      classes: names of its model class that cannot be derived from the `model_type`.
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
