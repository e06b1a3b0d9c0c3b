"""Makes the layers of a published model from its keys, with the counts of their parts.

Letters: D model width, N query heads, K key-value heads, H head width, F feed-forward width,
E experts.
"""

from __future__ import annotations

from qkvjax.attention.spec import AttentionSpec
from qkvjax.errors import UserError
from qkvjax.interop.families import Experts
from qkvjax.interop.keys import Keys
from qkvjax.interop.latent import LatentSpec
from qkvjax.interop.layer_kinds import sparse_layers, windows
from qkvjax.interop.shapes import Layer, Spec

MOST_FEED_FORWARD_TIMES = 1000


def layers(keys: Keys) -> tuple[Layer, ...]:
    """Returns every layer of the model.

    Raises:
      UserError: a key is missing or impossible, or plan does not count such layers.
    """
    num_layers = keys.whole("num_hidden_layers")
    bounds = windows(keys, num_layers)
    sparse = sparse_layers(keys, num_layers)
    # The last layers of some models read the cache of an earlier one.
    num_caching = num_layers - keys.whole("num_kv_shared_layers", 0, least=0)
    return tuple(
        _layer(keys, bounds[i], sparse[i], borrows=0 < num_caching <= i) for i in range(num_layers)
    )


def per_layer_width(keys: Keys) -> int:
    """Returns the width of Gemma 4's embedding of every layer; 0 where there is none."""
    if not keys.family.per_layer_inputs:
        return 0
    return keys.whole("hidden_size_per_layer_input", least=0)


def norm_numbers(keys: Keys) -> int:
    """Returns the learned numbers per channel of a norm."""
    without_gain = keys.get("layer_norm_elementwise_affine") is False
    return 0 if without_gain else keys.family.norm_numbers


def _layer(keys: Keys, window: int | None, sparse: bool, borrows: bool) -> Layer:
    """Returns one layer.

    Args:
      keys: of the file.
      window: how many keys a query sees; None means all.
      sparse: whether the layer has experts.
      borrows: whether it reads the cache of an earlier layer.
    """
    family = keys.family
    attention = _attention(keys, window)
    matrices = _attention_extras(keys, attention)
    vectors = _vectors(keys, attention)
    fields = {}
    if sparse:
        fields = _experts(keys, family.experts)
        matrices += _router_matrix(keys, family.experts) + fields["shared_macs"]
        vectors += _router_vectors(keys, family.experts)
    ffn_macs = 0
    if not sparse or family.experts.beside_dense:
        ffn_macs, biases = _feed_forward(keys, borrows)
        vectors += biases
    if not family.latent and attention.qk_norm and family.qk_norm_bias:
        fields["role_norm_params"] = attention.head_dim
    if not family.latent and keys.flag(family.wide_qk_norm):
        fields["head_norm_params"] = attention.head_dim
    return Layer(
        attention,
        dense_params=vectors + matrices + ffn_macs,
        dense_macs=matrices + ffn_macs,
        ffn_macs=ffn_macs,
        reuses_cache=borrows,
        **fields,
    )


def _attention(keys: Keys, window: int | None) -> Spec:
    """Returns the attention of one layer; every error names the file."""
    try:
        return _latent_spec(keys) if keys.family.latent else _attention_spec(keys, window)
    except UserError as error:
        message = str(error)
        if not message.startswith(str(keys.path)):  # raised by AttentionSpec
            message = f"{keys.path}: {message}"
        raise UserError(message) from None


def _attention_spec(keys: Keys, window: int | None) -> AttentionSpec:
    family = keys.family
    num_heads = keys.whole("num_attention_heads")
    num_kv_heads = num_heads
    if family.grouped:
        num_kv_heads = keys.whole("num_key_value_heads", num_heads)
    head_dim = keys.whole("head_dim") if keys.get("head_dim") else None
    tied_kv = False
    if family.wide_globals and window is None:
        head_dim = keys.whole("global_head_dim")
        tied_kv = bool(keys.get("attention_k_eq_v"))
        if tied_kv:
            num_kv_heads = keys.whole("num_global_key_value_heads", num_kv_heads)
    return AttentionSpec(
        d_model=keys.whole("hidden_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        sharing="q-k=v" if tied_kv else "q-k-v",
        position="rope" if keys.flag(family.rope) else "none",
        qk_norm=keys.flag(family.qk_norm),
        window=window,
        use_bias=keys.flag(family.qkv_bias),
    )


def _latent_spec(keys: Keys) -> LatentSpec:
    # An explicit null means queries without a latent (DeepSeek-V2-Lite).
    direct_queries = keys.get("q_lora_rank") is None
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
        query_rank=None if direct_queries else keys.whole("q_lora_rank"),
        rope_dim=keys.whole("qk_rope_head_dim"),
        nope_dim=keys.whole("qk_nope_head_dim"),
        value_dim=keys.whole("v_head_dim", d // n),
        use_bias=keys.flag(keys.family.qkv_bias),
        index_heads=keys.whole("index_n_heads") if indexed else 0,
        index_dim=keys.whole("index_head_dim") if indexed else 0,
        index_topk=keys.whole("index_topk") if indexed else None,
    )


def _attention_extras(keys: Keys, attention: Spec) -> int:
    """Returns the numbers of matrices around attention that its spec does not know."""
    d = keys.whole("hidden_size")
    total = 0
    if keys.family.attention_gate:
        total += d * attention.num_heads * attention.head_dim
    if width := per_layer_width(keys):
        total += 2 * d * width
    return total


def _vectors(keys: Keys, attention: Spec) -> int:
    """Returns the numbers of norms, biases and the like, outside feed-forward and experts."""
    family = keys.family
    d = keys.whole("hidden_size")
    num_heads = attention.num_heads
    norms = family.norms
    if family.parallel and keys.get(family.parallel):
        norms -= 1
    total = norms * norm_numbers(keys) * d
    if not family.latent:
        # The spec counts the bias of the output projection where q, k and v have one.
        total += d * (keys.flag(family.out_bias) - attention.use_bias)
    if per_layer_width(keys):
        total += d  # one more norm
    if family.sinks:
        total += num_heads
    if family.sub_norms:
        total += num_heads * attention.head_dim + keys.whole("intermediate_size")
    if family.activation_params and keys.get("hidden_act") == "xielu":
        total += family.activation_params
    return total


def _feed_forward(keys: Keys, borrows: bool) -> tuple[int, int]:
    """Returns the numbers of the matrices and of the biases of a dense feed-forward."""
    d = keys.whole("hidden_size")
    f = _feed_forward_width(keys, borrows)
    matrices = _num_matrices(keys)
    biases = (matrices - 1) * f + d if keys.flag(keys.family.mlp_bias) else 0
    return matrices * d * f, biases


def _num_matrices(keys: Keys) -> int:
    """Returns how many matrices a feed-forward has: a gated one has a third."""
    return 3 if keys.family.gated else 2


def _feed_forward_width(keys: Keys, borrows: bool) -> int:
    times = keys.get("feed_forward_times", keys.family.feed_forward_times)
    default = None
    # A fraction in some files: MPT's expansion_ratio.
    if isinstance(times, int | float) and 0 < times < MOST_FEED_FORWARD_TIMES:
        default = int(keys.whole("hidden_size") * times)
    name = keys.family.experts.dense_width if keys.family.experts else "intermediate_size"
    doubled = borrows and keys.get("use_double_wide_mlp")
    return keys.whole(name, default) * (2 if doubled else 1)


def _experts(keys: Keys, experts: Experts) -> dict[str, int]:
    """Returns the fields of a `Layer` that describe its experts."""
    d = keys.whole("hidden_size")
    count = keys.whole(experts.count)
    used = keys.whole(experts.used)
    if used > count:
        raise UserError(f"{keys.path}: {used} experts a token, but there are {count}: correct one")
    f = keys.whole(experts.width)
    matrices = _num_matrices(keys)
    macs = matrices * d * f
    bias = (matrices - 1) * f + d
    return {
        "num_experts": count,
        "experts_per_token": used,
        "expert_params": macs + (bias if _experts_have_biases(keys, experts) else 0),
        "expert_macs": macs,
        "shared_macs": matrices * d * _shared_width(keys, experts),
    }


def _shared_width(keys: Keys, experts: Experts) -> int:
    """Returns the feed-forward width of all experts that every token uses."""
    width = keys.whole(experts.shared_width, 0, least=0) if experts.shared_width else 0
    if experts.shared_count:
        width += keys.whole(experts.width) * keys.whole(experts.shared_count, 0, least=0)
    return width


def _router_matrix(keys: Keys, experts: Experts) -> int:
    """Returns the numbers of the router's matrix and of the shared expert's gate."""
    d = keys.whole("hidden_size")
    gate = d if experts.shared_gate and _shared_width(keys, experts) else 0
    return d * keys.whole(experts.count) + gate


def _router_vectors(keys: Keys, experts: Experts) -> int:
    """Returns the numbers of what a layer with experts has besides matrices and its experts."""
    d = keys.whole("hidden_size")
    count = keys.whole(experts.count)
    total = experts.norms * d
    if experts.router_bias:
        total += count
    if experts.router_scales:
        total += d + count
    shared_width = _shared_width(keys, experts)
    if shared_width and _experts_have_biases(keys, experts):
        total += (_num_matrices(keys) - 1) * shared_width + d
    return total


def _experts_have_biases(keys: Keys, experts: Experts) -> bool:
    return experts.biased or keys.flag(keys.family.mlp_bias)
