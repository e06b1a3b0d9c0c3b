"""Translates files that need more than other names for keys into the keys that `blocks` reads.

Each function takes the parsed values of a file and returns them with standard keys added. Values
that a file leaves out are the defaults of its configuration class in `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping

from qkvjax.errors import UserError


def _part(values: Mapping, name: str) -> Mapping:
    """Returns the object under `name`, or an empty one; raises UserError for anything else."""
    value = values.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{name!r} must be a JSON object, and is {repr(value)[:40]}")
    return value


def falcon(values: Mapping) -> Mapping:
    """Translates Falcon: multi-query (7B), grouped (40B, 180B, 11B) or one K and V a head (RW)."""
    heads = values.get("num_attention_heads", values.get("n_head"))
    # The first files of 40B lack this switch; `n_head_kv` is a key that only they have.
    grouped = values.get("new_decoder_architecture", values.get("n_head_kv") is not None)
    norms = values.get("num_ln_in_parallel_attn")
    if norms is None and grouped:
        norms = 2
    kv_heads = heads
    if grouped:
        kv_heads = values.get("num_kv_heads", values.get("n_head_kv")) or heads
    elif values.get("multi_query", True):
        kv_heads = 1
    one_norm = bool(values.get("parallel_attn", True)) and norms != 2
    return dict(values) | {
        "num_key_value_heads": kv_heads,
        "one_norm": one_norm,
        "rotary": not values.get("alibi", False),
    }


def gpt_bigcode(values: Mapping) -> Mapping:
    """Translates GPTBigCode, which has one key-value head or as many as query heads."""
    heads = values.get("n_head", values.get("num_attention_heads"))
    return dict(values) | {"num_key_value_heads": 1 if values.get("multi_query", True) else heads}


def mpt(values: Mapping) -> Mapping:
    """Translates MPT, whose attention keys are in the object `attn_config`."""
    attention = _part(values, "attn_config")
    heads = values.get("n_heads")
    kv_heads = attention.get("kv_n_heads") or heads
    if attention.get("attn_type") == "multiquery_attention":
        kv_heads = 1
    # Positions are learned only if neither ALiBi nor RoPE is on.
    other_positions = attention.get("alibi", True) or attention.get("rope")
    learned = values.get("learned_pos_emb", True) and not other_positions
    return dict(values) | {
        "num_key_value_heads": kv_heads,
        "feed_forward_times": values.get("expansion_ratio", 4),
        "learned_positions": learned,
        "rotary": bool(attention.get("rope")),
        "biased": not values.get("no_bias", True),
        "qk_ln": attention.get("qk_ln", False),
    }


def dbrx(values: Mapping) -> Mapping:
    """Translates DBRX, whose keys are in the objects `attn_config` and `ffn_config`."""
    attention = _part(values, "attn_config")
    feed_forward = _part(values, "ffn_config")
    return dict(values) | {
        "num_key_value_heads": attention.get("kv_n_heads", 1),
        "num_experts": feed_forward.get("moe_num_experts", 4),
        "num_experts_per_tok": feed_forward.get("moe_top_k", 1),
        "intermediate_size": feed_forward.get("ffn_hidden_size", 3584),
    }


def gpt_neo(values: Mapping) -> Mapping:
    """Translates GPT-Neo: expands the patterns of `attention_types` to `layer_types`."""
    kinds = {"global": "full_attention", "local": "sliding_attention"}
    types = []
    try:
        for pattern, times in values.get("attention_types") or [[["global", "local"], 12]]:
            types += [kinds[name] for name in pattern] * times
    except (TypeError, ValueError, KeyError):
        raise UserError(
            "'attention_types' must be a list such as [[['global', 'local'], 12]], and is"
            f" {repr(values['attention_types'])[:40]}"
        ) from None
    window = values.get("window_size", 256)
    return dict(values) | {"layer_types": types, "sliding_window": window}


def chatglm(values: Mapping) -> Mapping:
    """Translates ChatGLM 2 and 3 and the first files of GLM-4; some have grouped heads."""
    heads = values.get("num_attention_heads")
    grouped = values.get("multi_query_attention", False)
    return dict(values) | {
        "num_key_value_heads": values.get("multi_query_group_num", 1) if grouped else heads,
        "qkv_biased": values.get("add_qkv_bias", False) or values.get("add_bias_linear", False),
    }


def qwen1(values: Mapping) -> Mapping:
    """Translates the first Qwen, whose `intermediate_size` is the sum of gate and up widths."""
    width = values.get("intermediate_size")
    if isinstance(width, int):
        width //= 2
    return dict(values) | {"intermediate_size": width, "biased": not values.get("no_bias", True)}


def opt(values: Mapping) -> Mapping:
    """Translates OPT; the 350M model has its norms after the blocks, and no final norm."""
    before = values.get("do_layer_norm_before", True)
    final = before and not values.get("_remove_final_layer_norm", False)
    return dict(values) | {"has_final_norm": final}


def hunyuan_moe(values: Mapping) -> Mapping:
    """Translates Hunyuan MoE: a list of equal entries becomes one number."""
    changed = dict(values)
    for name in ("moe_topk", "num_experts", "moe_intermediate_size", "num_shared_expert"):
        value = values.get(name)
        if isinstance(value, list) and len(set(map(repr, value))) == 1:
            changed[name] = value[0]
    return changed


def exaone4(values: Mapping) -> Mapping:
    """Translates EXAONE 4: the pattern "LLLG" of layers becomes the number 4."""
    pattern = values.get("sliding_window_pattern")
    regular = isinstance(pattern, str) and pattern == "L" * (len(pattern) - 1) + "G"
    return dict(values) | ({"sliding_window_pattern": len(pattern)} if regular else {})
