"""Finds out which layers of a published model have windows, experts or rotary positions."""

from __future__ import annotations

from qkvjax.errors import UserError
from qkvjax.interop.keys import Keys

_FULL = "full_attention"
_SLIDING = "sliding_attention"
_CHUNKED = "chunked_attention"
# Entries of `layer_types` that plan counts, and the key with the size of their window.
_WINDOW_KEYS = {
    _FULL: None,
    "attention": None,
    "indexed_attention": None,
    _SLIDING: "sliding_window",
    _CHUNKED: "attention_chunk_size",
}


def windows(keys: Keys, num_layers: int) -> list[int | None]:
    """Returns for each layer how many keys a query sees; None means all.

    Raises:
      UserError: a layer is of a type that plan does not count.
    """
    types = keys.listed("layer_types", num_layers) or _layer_types(keys, num_layers)
    if keys.family.wide_globals:
        # The configuration class of Gemma 4 forces the last layer to see everything.
        types = [*types[:-1], _FULL]
    for name in types:
        if not isinstance(name, str) or name not in _WINDOW_KEYS:
            raise UserError(
                f"{keys.path}: plan counts layers of full_attention and sliding_attention, and"
                f" {keys.where}'layer_types' has {name!r}, which does not cache K and V like them:"
                " give it a model without such layers"
            )
    return [keys.whole(_WINDOW_KEYS[name]) if _WINDOW_KEYS[name] else None for name in types]


def _layer_types(keys: Keys, num_layers: int) -> list[str]:
    """Returns the type of each layer of a file without `layer_types`, by the family's rule."""
    rule = keys.family.windows
    rotary = _rotary_layers(keys, num_layers)
    if rule == "chunked":
        if not keys.get("attention_chunk_size"):
            return [_FULL] * num_layers
        return [_CHUNKED if rotates else _FULL for rotates in rotary]
    off = rule == "none" or keys.values.get("use_sliding_window") is False
    if off or keys.get("sliding_window") is None:
        return [_FULL] * num_layers
    if rule in ("qwen", "no_rope") and not keys.get("use_sliding_window"):
        return [_FULL] * num_layers
    if rule == "no_rope":
        return [_FULL if rotates else _SLIDING for rotates in rotary]
    first = keys.whole("max_window_layers", least=0) if rule in ("qwen", "late") else 0
    types = [_FULL] * first + [_SLIDING] * (num_layers - first)
    if rule == "pattern" or keys.get("sliding_window_pattern") is not None:
        every = keys.whole("sliding_window_pattern")
        types[every - 1 :: every] = [_FULL] * len(types[every - 1 :: every])
    return types[:num_layers]


def _rotary_layers(keys: Keys, num_layers: int) -> list[bool]:
    """Returns which layers rotate queries and keys (`no_rope_layers` has a 1 for them)."""
    if keys.get("no_rope_layers"):
        return [bool(entry) for entry in keys.listed("no_rope_layers", num_layers)]
    every = keys.get("no_rope_layer_interval")
    return [not every or (i + 1) % every != 0 for i in range(num_layers)]


def sparse_layers(keys: Keys, num_layers: int) -> list[bool]:
    """Returns which layers have experts."""
    experts = keys.family.experts
    if experts is None or not keys.get(experts.count):
        return [False] * num_layers
    types = keys.listed("mlp_layer_types", num_layers)
    if types is not None:
        return [name == "sparse" for name in types]
    layers = range(num_layers)
    if experts.layers == "step":
        every = keys.whole("decoder_sparse_step", 1)
        dense = keys.listed("mlp_only_layers") or []
        return [i not in dense and (i + 1) % every == 0 for i in layers]
    if experts.layers == "first":
        first = keys.whole("first_k_dense_replace", 0, least=0)
        every = keys.whole("moe_layer_freq", 1)
        return [i >= first and i % every == 0 for i in layers]
    if experts.layers == "listed":
        sparse = keys.listed("moe_layers")
        every = keys.whole("interleave_moe_layer_step", 1)
        if sparse is not None:
            return [i in sparse for i in layers]
        return [(i + 1) % every == 0 for i in layers]
    if experts.layers == "range":
        start = keys.whole("moe_layer_start_index", 1, least=0)
        end = keys.whole("moe_layer_end_index", num_layers - 1, least=-1)
        if end == -1:
            end = num_layers - 1
        every = keys.whole("moe_layer_interval", 1)
        return [start <= i <= end and (i + 1) % every == 0 for i in layers]
    return [True] * num_layers
