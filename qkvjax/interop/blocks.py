"""Makes the layers of a published model from its keys: attention, feed-forward, experts, windows.

Letters: D model width, N query heads, K key-value heads, H head width, F feed-forward width,
E experts.
"""

from __future__ import annotations

from qkvjax.attention.spec import AttentionSpec
from qkvjax.errors import UserError
from qkvjax.interop.families import Experts
from qkvjax.interop.keys import Keys
from qkvjax.interop.latent import LatentSpec
from qkvjax.interop.shapes import Layer

_LAYER_TYPES = {
    "full_attention": "",
    "attention": "",
    "indexed_attention": "",
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}


def layers(keys: Keys) -> tuple[Layer, ...]:
    """Returns every layer of the model; raises UserError for keys that make none."""
    num_layers = keys.whole("num_hidden_layers")
    bounds = _windows(keys, num_layers)
    sparse = _sparse_layers(keys, num_layers)
    keeping = num_layers - keys.whole("num_kv_shared_layers", 0, least=0)
    return tuple(
        _layer(keys, bounds[i], sparse[i], borrows=0 < keeping <= i) for i in range(num_layers)
    )


def per_layer_width(keys: Keys) -> int:
    """Returns the width of Gemma 4's embedding of every layer; 0 where there is none."""
    if not keys.family.per_layer_inputs:
        return 0
    return keys.whole("hidden_size_per_layer_input", least=0)


def norm_numbers(keys: Keys) -> int:
    """Returns the learned numbers that a norm has for each channel."""
    plain = keys.get("layer_norm_elementwise_affine") is False
    return 0 if plain else keys.family.norm_numbers


def _layer(keys: Keys, window: int | None, sparse: bool, borrows: bool) -> Layer:
    family = keys.family
    d = keys.whole("hidden_size")
    n = keys.whole("num_attention_heads")
    try:
        attention = _latent(keys) if family.latent else _attention(keys, window)
    except UserError as error:
        message = str(error)
        if not message.startswith(str(keys.path)):
            message = f"{keys.path}: {message}"
        raise UserError(message) from None
    norms = family.norms
    if family.parallel and keys.get(family.parallel):
        norms -= 1
    dense = norms * norm_numbers(keys) * d
    if not family.latent:
        dense += d * (keys.flag(family.out_bias) - attention.use_bias)
    extra_macs = 0
    if family.attention_gate:
        extra_macs += d * n * attention.head_dim
    if h := per_layer_width(keys):
        extra_macs += 2 * d * h
        dense += d
    if family.sinks:
        dense += n
    if family.sub_norms:
        dense += n * attention.head_dim + keys.whole("intermediate_size")
    if family.activation_params and keys.get("hidden_act") == "xielu":
        dense += family.activation_params
    fields = _experts(keys, family.experts) if sparse else {}
    dense += fields.pop("router_params", 0)
    extra_macs += fields.pop("router_macs", 0)
    ffn_macs = 0
    if not sparse or family.experts.beside_dense:
        f = _feed_forward_width(keys, borrows)
        matrices = 3 if family.gated else 2
        ffn_macs = matrices * d * f
        if keys.flag(family.mlp_bias):
            dense += (matrices - 1) * f + d
    shared_macs = fields.get("shared_macs", 0)
    if not family.latent and attention.qk_norm and family.qk_norm_bias:
        fields["role_norm_params"] = attention.head_dim
    if not family.latent and keys.flag(family.wide_qk_norm):
        fields["head_norm_params"] = attention.head_dim
    return Layer(
        attention,
        dense_params=dense + extra_macs + ffn_macs + shared_macs,
        dense_macs=extra_macs + ffn_macs + shared_macs,
        ffn_macs=ffn_macs,
        reuses_cache=borrows,
        **fields,
    )


def _attention(keys: Keys, window: int | None) -> AttentionSpec:
    family = keys.family
    n = keys.whole("num_attention_heads")
    k = keys.whole("num_key_value_heads", n) if family.grouped else n
    head_dim = keys.whole("head_dim") if keys.get("head_dim") else None
    tied_kv = False
    if family.wide_globals and window is None:
        head_dim = keys.whole("global_head_dim")
        tied_kv = bool(keys.get("attention_k_eq_v"))
        k = keys.whole("num_global_key_value_heads", k) if tied_kv else k
    return AttentionSpec(
        d_model=keys.whole("hidden_size"),
        num_heads=n,
        num_kv_heads=k,
        head_dim=head_dim,
        sharing="q-k=v" if tied_kv else "q-k-v",
        position="rope" if keys.flag(family.rope) else "none",
        qk_norm=keys.flag(family.qk_norm),
        window=window,
        use_bias=keys.flag(family.qkv_bias),
    )


def _latent(keys: Keys) -> LatentSpec:
    # An explicit null says that queries are projected at once (DeepSeek-V2-Lite).
    direct = keys.get("q_lora_rank") is None
    indexed = "indexer" in keys.family.kinds
    kinds = keys.listed("indexer_types") or []
    if any(kind != "full" for kind in kinds):
        raise UserError(
            f"{keys.path}: {keys.where}'indexer_types' names layers that share an indexer,"
            " which plan does not count: give it a model whose layers are alike"
        )
    d = keys.whole("hidden_size")
    n = keys.whole("num_attention_heads")
    return LatentSpec(
        d_model=d,
        num_heads=n,
        kv_rank=keys.whole("kv_lora_rank"),
        query_rank=None if direct else keys.whole("q_lora_rank"),
        rope_dim=keys.whole("qk_rope_head_dim"),
        nope_dim=keys.whole("qk_nope_head_dim"),
        value_dim=keys.whole("v_head_dim", d // n),
        use_bias=keys.flag(keys.family.qkv_bias),
        index_heads=keys.whole("index_n_heads") if indexed else 0,
        index_dim=keys.whole("index_head_dim") if indexed else 0,
        index_topk=keys.whole("index_topk") if indexed else None,
    )


def _feed_forward_width(keys: Keys, borrows: bool) -> int:
    times = keys.get("feed_forward_times", keys.family.feed_forward_times)
    default = None
    if (
        isinstance(times, int | float) and 0 < times < 1000
    ):  # MPT's expansion_ratio may be a fraction
        default = int(keys.whole("hidden_size") * times)
    name = keys.family.experts.dense_width if keys.family.experts else "intermediate_size"
    doubled = borrows and keys.get("use_double_wide_mlp")
    return keys.whole(name, default) * (2 if doubled else 1)


def _experts(keys: Keys, experts: Experts) -> dict:
    """Returns the fields of a layer with experts, and what its router adds."""
    d = keys.whole("hidden_size")
    e = keys.whole(experts.count)
    used = keys.whole(experts.used)
    if used > e:
        raise UserError(f"{keys.path}: {used} experts a token, but there are {e}: correct one")
    f = keys.whole(experts.width)
    gated = 3 if keys.family.gated else 2
    expert_macs = gated * d * f
    bias = (gated - 1) * f + d
    shared_f = keys.whole(experts.shared_width, 0, least=0) if experts.shared_width else 0
    if experts.shared_count:
        shared_f += f * keys.whole(experts.shared_count, 0, least=0)
    router = d * e
    others = experts.norms * d
    if experts.router_bias:
        others += e
    if experts.router_scales:
        others += d + e
    if experts.shared_gate and shared_f:
        router += d
    biased = experts.biased or keys.flag(keys.family.mlp_bias)
    if biased and shared_f:
        others += (gated - 1) * shared_f + d
    return {
        "num_experts": e,
        "experts_per_token": used,
        "expert_params": expert_macs + (bias if biased else 0),
        "expert_macs": expert_macs,
        "shared_macs": gated * d * shared_f,
        "router_macs": router,
        "router_params": others,
    }


def _sparse_layers(keys: Keys, num_layers: int) -> list[bool]:
    """Returns whether each layer has experts."""
    experts = keys.family.experts
    if experts is None or not keys.get(experts.count):
        return [False] * num_layers
    named = keys.listed("mlp_layer_types", num_layers)
    if named is not None:
        return [name == "sparse" for name in named]
    numbers = range(num_layers)
    if experts.layers == "step":
        every = keys.whole("decoder_sparse_step", 1)
        plain = keys.listed("mlp_only_layers") or []
        return [i not in plain and (i + 1) % every == 0 for i in numbers]
    if experts.layers == "first":
        first = keys.whole("first_k_dense_replace", 0, least=0)
        every = keys.whole("moe_layer_freq", 1)
        return [i >= first and i % every == 0 for i in numbers]
    if experts.layers == "listed":
        chosen = keys.listed("moe_layers")
        step = keys.whole("interleave_moe_layer_step", 1)
        return [i in chosen if chosen is not None else (i + 1) % step == 0 for i in numbers]
    if experts.layers == "range":
        start = keys.whole("moe_layer_start_index", 1, least=0)
        end = keys.whole("moe_layer_end_index", num_layers - 1, least=-1)
        end = num_layers - 1 if end == -1 else end
        every = keys.whole("moe_layer_interval", 1)
        return [start <= i <= end and (i + 1) % every == 0 for i in numbers]
    return [True] * num_layers


def _windows(keys: Keys, num_layers: int) -> list[int | None]:
    """Returns the keys that a query of each layer sees; None means all."""
    types = keys.listed("layer_types", num_layers) or _layer_types(keys, num_layers)
    if keys.family.wide_globals:
        types = [*types[:-1], "full_attention"]  # as Gemma 4's configuration class forces
    for name in types:
        if not isinstance(name, str) or name not in _LAYER_TYPES:
            raise UserError(
                f"{keys.path}: plan counts layers of full_attention and sliding_attention, and"
                f" {keys.where}'layer_types' has {name!r}, which does not cache K and V like them:"
                " give it a model without such layers"
            )
    return [keys.whole(_LAYER_TYPES[name]) if _LAYER_TYPES[name] else None for name in types]


def _layer_types(keys: Keys, num_layers: int) -> list[str]:
    kind = keys.family.windows
    numbers = range(num_layers)
    full = ["full_attention"] * num_layers
    rotary = _rotary_layers(keys, num_layers)
    if kind == "chunked":
        if not keys.get("attention_chunk_size"):
            return full
        return ["chunked_attention" if rotary[i] else "full_attention" for i in numbers]
    off = kind == "none" or keys.values.get("use_sliding_window") is False
    if off or keys.get("sliding_window") is None:
        return full
    first = 0
    every = None
    if kind == "no_rope":
        bound = [not rotary[i] for i in numbers] if keys.get("use_sliding_window") else []
        return ["sliding_attention" if one else "full_attention" for one in bound] or full
    if kind in ("qwen", "late"):
        if kind == "qwen" and not keys.get("use_sliding_window"):
            return full
        first = keys.whole("max_window_layers", least=0)
    if kind == "pattern" or keys.get("sliding_window_pattern") is not None:
        every = keys.whole("sliding_window_pattern")
    return [
        "full_attention" if i < first or (every and (i + 1) % every == 0) else "sliding_attention"
        for i in numbers
    ]


def _rotary_layers(keys: Keys, num_layers: int) -> list[bool]:
    """Returns which layers rotate queries and keys (`no_rope_layers` has a 1 for them)."""
    named = keys.get("no_rope_layers")
    if named:
        return [bool(one) for one in keys.listed("no_rope_layers", num_layers)]
    every = keys.get("no_rope_layer_interval")
    return [not every or (i + 1) % every != 0 for i in range(num_layers)]
