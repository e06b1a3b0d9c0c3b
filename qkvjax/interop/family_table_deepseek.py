"""The architectures after DeepSeek: latent attention, or experts that every token uses.

Source: the public modelling code of `transformers` (5.24), and the remote code of DeepSeek-MoE.
"""

from __future__ import annotations

import dataclasses

from qkvjax.interop import dialects
from qkvjax.interop.families import Experts, Family

_LATENT = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_GLM = _LATENT | {"n_shared_experts": 1, "qk_nope_head_dim": 192, "v_head_dim": 256}
_MINICPM3 = {
    "kv_lora_rank": 256,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
}

_ONE_SHARED = {"n_shared_experts": 1}
_DEEPSEEK_EXPERTS = Experts(
    count="n_routed_experts", shared_count="n_shared_experts", layers="first"
)
_SHARED_EXPERTS = Experts(shared_count="num_shared_experts", layers="first")
_DEEPSEEK_V3 = Family(
    latent=True,
    mlp_bias=False,
    experts=_DEEPSEEK_EXPERTS,
    kinds=("latent",),
    defaults=_LATENT | _ONE_SHARED | {"first_k_dense_replace": 3},
    classes=("deepseekv3",),
)
_INDEXED = dataclasses.replace(_DEEPSEEK_V3, kinds=("latent", "indexer"), classes=())

DEEPSEEK_FAMILIES = {
    "deepseek": Family(mlp_bias=False, experts=_DEEPSEEK_EXPERTS),
    "deepseek_v2": dataclasses.replace(
        _DEEPSEEK_V3,
        mlp_bias="mlp_bias",
        defaults=_LATENT | {"first_k_dense_replace": 0, "n_shared_experts": 2},
        classes=(),
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _INDEXED,
    "minicpm3": dataclasses.replace(
        _DEEPSEEK_V3, mlp_bias="mlp_bias", experts=None, tied=True, defaults=_MINICPM3, classes=()
    ),
    "youtu": dataclasses.replace(
        _DEEPSEEK_V3, experts=None, tied=True, defaults=_LATENT, classes=()
    ),
    "glm4_moe": Family(
        out_bias=False,
        mlp_bias=False,
        qk_norm="use_qk_norm",
        experts=_DEEPSEEK_EXPERTS,
        defaults=_ONE_SHARED | {"first_k_dense_replace": 1, "num_key_value_heads": 8},
    ),
    "glm4_moe_lite": dataclasses.replace(
        _DEEPSEEK_V3, defaults=_GLM | {"q_lora_rank": 768, "first_k_dense_replace": 1}, classes=()
    ),
    "dots1": Family(
        mlp_bias=False,
        qk_norm=True,
        windows="late",
        experts=_DEEPSEEK_EXPERTS,
        defaults={"max_window_layers": 62},
    ),
    "glm_moe_dsa": dataclasses.replace(
        _INDEXED, defaults=_GLM | {"q_lora_rank": 2048, "first_k_dense_replace": 3}
    ),
    "axk1": dataclasses.replace(
        _DEEPSEEK_V3,
        experts=dataclasses.replace(_DEEPSEEK_EXPERTS, norms=1),
        defaults=_LATENT | _ONE_SHARED | {"first_k_dense_replace": 1},
        classes=(),
    ),
    "sarvam_mla": dataclasses.replace(
        _DEEPSEEK_V3,
        defaults=_LATENT | _ONE_SHARED | {"q_lora_rank": None, "first_k_dense_replace": 1},
        classes=(),
    ),
    "sarvam_moe": Family(
        out_bias=False,
        mlp_bias=False,
        qk_norm="use_qk_norm",
        experts=_DEEPSEEK_EXPERTS,
        defaults=_ONE_SHARED
        | {
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "num_key_value_heads": 4,
            "head_dim": 64,
        },
    ),
    "solar_open": Family(
        out_bias=False,
        mlp_bias=False,
        experts=_DEEPSEEK_EXPERTS,
        defaults=_ONE_SHARED | {"head_dim": 128, "num_key_value_heads": 8},
    ),
    "hy_v3": Family(
        qk_norm=True,
        experts=_SHARED_EXPERTS,
        names={"moe_intermediate_size": ("moe_intermediate_size", "expert_hidden_dim")},
        defaults={
            "head_dim": 128,
            "num_key_value_heads": 8,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "exaone_moe": Family(
        standard=dialects.exaone4,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=True,
        windows="pattern",
        experts=_SHARED_EXPERTS,
        defaults={
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "first_k_dense_replace": 1,
            "num_shared_experts": 1,
        },
    ),
    "afmoe": Family(
        names={
            "first_k_dense_replace": ("num_dense_layers",),
            "sliding_window_pattern": ("global_attn_every_n_layers",),
        },
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=True,
        norms=4,
        windows="pattern",
        attention_gate=True,
        experts=dataclasses.replace(_SHARED_EXPERTS, router_bias=True),
        defaults={
            "head_dim": 128,
            "num_shared_experts": 2,
            "sliding_window": 1024,
            "sliding_window_pattern": 4,
            "first_k_dense_replace": 1,
        },
    ),
}
