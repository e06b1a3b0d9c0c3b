"""The table of architectures whose parameters and caches `plan --model` counts exactly.

Two more files have parts of it: `family_table_gpt` those after GPT-2 (LayerNorm, feed-forwards of
two matrices), `family_table_deepseek` those with latent attention or DeepSeek's experts.

Source: the public modelling code of `transformers` (5.24), and of models with remote code:
baichuan, chatglm, deepseek, internlm, minicpm, qwen.
"""

from __future__ import annotations

import dataclasses

from qkvjax.interop import dialects
from qkvjax.interop.families import Experts, Family
from qkvjax.interop.family_table_deepseek import DEEPSEEK_FAMILIES
from qkvjax.interop.family_table_gpt import GPT_FAMILIES

_GEMMA = {"head_dim": 256}
_GEMMA2 = _GEMMA | {
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
}
_GEMMA3 = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
_GEMMA4 = _GEMMA3 | {
    "vocab_size": 262_144,
    "sliding_window": 512,
    "global_head_dim": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
}
_MIXTRAL_EXPERTS = Experts(count="num_local_experts", width="intermediate_size")
_QWEN_EXPERTS = Experts(layers="step")
_EITHER_COUNT = {"num_experts": ("num_experts", "num_local_experts")}

_LLAMA = Family()
_MISTRAL = Family(
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    windows="all",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)
_QWEN2 = Family(
    qkv_bias=True,
    out_bias=False,
    mlp_bias=False,
    windows="qwen",
    defaults={"max_window_layers": 28},
)
_QWEN3 = Family(
    qk_norm=True,
    mlp_bias=False,
    windows="qwen",
    defaults={"head_dim": 128, "max_window_layers": 28},
)
_QWEN3_MOE = dataclasses.replace(
    _QWEN3, experts=_QWEN_EXPERTS, names=_EITHER_COUNT, defaults={"num_key_value_heads": 4}
)
_GLM4 = Family(
    qkv_bias="attention_bias",
    out_bias=False,
    mlp_bias=False,
    norms=4,
    defaults={"attention_bias": True, "num_key_value_heads": 2, "head_dim": 128},
)
_GEMMA_FAMILY = Family(tied=True, mlp_bias=False, defaults=_GEMMA)
_OLMO2 = Family(wide_qk_norm=True, mlp_bias=False)
_COHERE = Family(wide_qk_norm="use_qk_norm", mlp_bias=False, norms=1, tied=True)
_ERNIE = Family(qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", tied=True)

_OTHERS = {
    "llama": dataclasses.replace(_LLAMA, classes=("llama", "yi", "aquila", "baichuan")),
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "ministral3": Family(defaults={"head_dim": 128, "num_key_value_heads": 8}),
    "mixtral": dataclasses.replace(
        _MISTRAL, defaults={"num_key_value_heads": 8}, experts=_MIXTRAL_EXPERTS
    ),
    "llama4_text": Family(
        mlp_bias=False,
        windows="chunked",
        defaults={
            "head_dim": 128,
            "num_key_value_heads": 8,
            "attention_chunk_size": 8192,
            "interleave_moe_layer_step": 1,
            "no_rope_layer_interval": 4,
        },
        experts=Experts(
            count="num_local_experts",
            width="intermediate_size",
            dense_width="intermediate_size_mlp",
            shared_width="intermediate_size",
            layers="listed",
        ),
        kinds=("chunked",),
    ),
    "phi": Family(
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        head_bias=True,
        qk_norm="qk_layernorm",
        qk_norm_bias=True,
        norms=1,
        norm_numbers=2,
    ),
    "phi3": Family(qkv_bias=False, out_bias=False, mlp_bias=False, windows="all"),
    "phimoe": Family(
        head_bias="lm_head_bias",
        norm_numbers=2,
        windows="all",
        experts=_MIXTRAL_EXPERTS,
        defaults={"num_key_value_heads": 8},
    ),
    "qwen2": _QWEN2,
    "qwen2_moe": dataclasses.replace(
        _QWEN2,
        qkv_bias="qkv_bias",
        names=_EITHER_COUNT,
        defaults={"qkv_bias": True},
        experts=dataclasses.replace(
            _QWEN_EXPERTS, shared_width="shared_expert_intermediate_size", shared_gate=True
        ),
    ),
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "gpt_oss": Family(
        windows="pattern",
        names={"num_experts_per_tok": ("num_experts_per_tok", "experts_per_token")},
        defaults={
            "attention_bias": True,
            "head_dim": 64,
            "num_key_value_heads": 8,
            "sliding_window": 128,
            "sliding_window_pattern": 2,
        },
        experts=dataclasses.replace(_MIXTRAL_EXPERTS, router_bias=True, biased=True),
        sinks=True,
    ),
    "gemma": _GEMMA_FAMILY,
    "gemma2": dataclasses.replace(_GEMMA_FAMILY, norms=4, windows="pattern", defaults=_GEMMA2),
    "vaultgemma": dataclasses.replace(_GEMMA_FAMILY, windows="pattern", defaults=_GEMMA2),
    "gemma3_text": dataclasses.replace(
        _GEMMA_FAMILY, norms=4, qk_norm=True, windows="pattern", defaults=_GEMMA3
    ),
    "gemma4_text": dataclasses.replace(
        _GEMMA_FAMILY,
        norms=4,
        qk_norm=True,
        windows="pattern",
        defaults=_GEMMA4,
        per_layer_inputs=True,
        wide_globals=True,
        names=_EITHER_COUNT,
        experts=Experts(used="top_k_experts", norms=3, router_scales=True, beside_dense=True),
    ),
    "starcoder2": Family(
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        gated=False,
        norm_numbers=2,
        tied=True,
        windows="all",
        defaults={"use_bias": True, "num_key_value_heads": 2},
    ),
    "stablelm": Family(
        qkv_bias="use_qkv_bias",
        out_bias=False,
        mlp_bias=False,
        wide_qk_norm="qk_layernorm",
        norm_numbers=2,
        parallel="use_parallel_residual",
        classes=("stablelm", "stablelmepoch"),
    ),
    "nemotron": Family(gated=False, norm_numbers=2),
    "arcee": Family(gated=False),
    "helium": Family(out_bias=False, defaults={"head_dim": 128}),
    "apertus": Family(
        gated=False,
        mlp_bias=False,
        qk_norm=True,
        activation_params=2,
        defaults={"hidden_act": "xielu"},
    ),
    "seed_oss": Family(
        out_bias="attention_out_bias",
        defaults={"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8},
    ),
    "bitnet": Family(mlp_bias=False, sub_norms=True, defaults={"num_key_value_heads": 5}),
    "jais2": Family(
        gated=False, norm_numbers=2, defaults={"attention_bias": True, "mlp_bias": True}
    ),
    "olmo": Family(mlp_bias=False, norm_numbers=0),
    "olmo2": _OLMO2,
    "olmo3": dataclasses.replace(
        _OLMO2,
        windows="pattern",
        defaults={"sliding_window": 4096, "sliding_window_pattern": 4},
    ),
    "olmoe": dataclasses.replace(_OLMO2, experts=Experts(width="intermediate_size")),
    "flex_olmo": dataclasses.replace(_OLMO2, experts=Experts(width="intermediate_size")),
    "smollm3": Family(
        tied=True,
        windows="no_rope",
        defaults={"no_rope_layer_interval": 4, "num_key_value_heads": 4},
    ),
    "glm": dataclasses.replace(_GLM4, norms=2),
    "glm4": _GLM4,
    "cohere": _COHERE,
    "cohere2": dataclasses.replace(
        _COHERE,
        wide_qk_norm=False,
        windows="pattern",
        defaults={"sliding_window": 4096, "sliding_window_pattern": 4},
    ),
    "granite": Family(),
    "granitemoe": Family(experts=_MIXTRAL_EXPERTS),
    "granitemoeshared": Family(
        experts=dataclasses.replace(_MIXTRAL_EXPERTS, shared_width="shared_intermediate_size")
    ),
    "ernie4_5": dataclasses.replace(_ERNIE, defaults={"head_dim": 128, "num_key_value_heads": 2}),
    "ernie4_5_moe": dataclasses.replace(
        _ERNIE,
        head_bias="use_bias",
        experts=Experts(
            count="moe_num_experts",
            used="moe_k",
            layers="range",
            shared_count="moe_num_shared_experts",
            router_bias=True,
        ),
        defaults={"num_key_value_heads": 4, "moe_num_shared_experts": 2},
    ),
    "hunyuan_v1_dense": Family(mlp_bias=False, qk_norm=True, classes=("hunyuandensev1",)),
    "hunyuan_v1_moe": Family(
        standard=dialects.hunyuan_moe,
        mlp_bias=False,
        qk_norm=True,
        experts=Experts(
            used="moe_topk", width="intermediate_size", shared_width="intermediate_size"
        ),
        classes=("hunyuanmoev1",),
    ),
    "exaone": Family(
        names={"num_hidden_layers": ("num_layers",)},
        defaults={"num_key_value_heads": 8},
        classes=("llama",),
    ),
    "exaone4": Family(
        standard=dialects.exaone4,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=True,
        windows="pattern",
        defaults={"sliding_window": 4096, "sliding_window_pattern": 4},
    ),
    "minimax_m2": Family(
        qkv_bias=False,
        out_bias=False,
        wide_qk_norm=True,
        experts=_MIXTRAL_EXPERTS,
        defaults={"head_dim": 128, "num_key_value_heads": 8},
    ),
    "minicpm": Family(mlp_bias=False, tied=True),
    "baichuan": Family(mlp_bias=False),
    "internlm3": Family(defaults={"head_dim": 128, "num_key_value_heads": 2}),
    "iquestcoder": Family(defaults={"head_dim": 128, "num_key_value_heads": 8}),
    "internlm": Family(qkv_bias="bias", out_bias="bias", mlp_bias=False),
    "internlm2": Family(qkv_bias="bias", out_bias="bias", mlp_bias=False),
    "qwen": Family(
        standard=dialects.qwen1,
        names={"head_dim": ("kv_channels",), "max_position_embeddings": ("seq_length",)},
        qkv_bias=True,
        out_bias="biased",
        mlp_bias="biased",
        classes=("qwen", "qwenlm"),
    ),
    "chatglm": Family(
        standard=dialects.chatglm,
        names={
            "num_hidden_layers": ("num_layers",),
            "intermediate_size": ("ffn_hidden_size",),
            "vocab_size": ("padded_vocab_size",),
            "head_dim": ("kv_channels",),
            "max_position_embeddings": ("seq_length",),
        },
        qkv_bias="qkv_biased",
        out_bias="add_bias_linear",
        mlp_bias="add_bias_linear",
        kinds=("multi-query",),
        classes=("chatglm", "chatglmmodel"),
    ),
}
FAMILIES = GPT_FAMILIES | DEEPSEEK_FAMILIES | _OTHERS

# Other values of `model_type` for the same architectures. Some are of the whole file, where its
# `text_config` has no `model_type`.
SAME = {
    "Yi": "llama",
    "aquila": "llama",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "glm4v_text": "glm4",
    "kimi_k2": "deepseek_v3",
    "llama4": "llama4_text",
    "llava": "llama",
    "mistral3": "mistral",
    "paligemma": "gemma",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "stablelm_epoch": "stablelm",
}

# A `text_config` has only the keys that differ from the defaults of its class.
NESTED_DEFAULTS = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 131_072,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 32_768,
    },
}
