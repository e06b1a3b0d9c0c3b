"""The older architectures, after GPT-2: LayerNorm with bias, feed-forwards of two matrices.

Source: the public modelling code of `transformers` (5.24), and llm-foundry for MPT.
"""

from __future__ import annotations

import dataclasses

from qkvjax.interop import dialects
from qkvjax.interop.families import Experts, Family

_GPT2_NAMES = {
    "hidden_size": ("n_embd", "n_embed"),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "intermediate_size": ("n_inner",),
    "max_position_embeddings": ("n_positions", "seq_length", "n_ctx"),
}
_MPT_NAMES = {
    "hidden_size": ("d_model",),
    "num_hidden_layers": ("n_layers",),
    "num_attention_heads": ("n_heads",),
    "max_position_embeddings": ("max_seq_len",),
}
_ALL_BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
_GPT2 = Family(
    **_ALL_BIASES,
    names=_GPT2_NAMES,
    grouped=False,
    gated=False,
    norm_numbers=2,
    tied=True,
    positions=0,
    rope=False,
    feed_forward_times=4,
)
_GPTJ = Family(
    names=_GPT2_NAMES,
    grouped=False,
    gated=False,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=True,
    head_bias=True,
    norms=1,
    norm_numbers=2,
    feed_forward_times=4,
)
_GPT_NEOX = Family(
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mlp_bias=True,
    grouped=False,
    gated=False,
    norm_numbers=2,
    defaults={"attention_bias": True},
)
_FALCON = Family(
    standard=dialects.falcon,
    names=_GPT2_NAMES | {"intermediate_size": ("ffn_hidden_size",)},
    defaults={"max_position_embeddings": 2048},
    gated=False,
    qkv_bias="bias",
    out_bias="bias",
    mlp_bias="bias",
    parallel="one_norm",
    norm_numbers=2,
    tied=True,
    rope="rotary",
    feed_forward_times=4,
    kinds=("multi-query",),
    classes=("falcon", "rw"),
)
GPT_FAMILIES = {
    "gpt2": _GPT2,
    "gpt_bigcode": dataclasses.replace(
        _GPT2, grouped=True, standard=dialects.gpt_bigcode, kinds=("multi-query",)
    ),
    "gpt_neo": dataclasses.replace(
        _GPT2,
        standard=dialects.gpt_neo,
        names={
            "num_hidden_layers": ("num_layers",),
            "num_attention_heads": ("num_heads",),
        },
        qkv_bias=False,
    ),
    "gptj": _GPTJ,
    "codegen": _GPTJ,
    "gpt_neox": _GPT_NEOX,
    "bloom": dataclasses.replace(
        _GPT2, positions=None, embedding_norm=True, names=_GPT2_NAMES | {"intermediate_size": ()}
    ),
    "mpt": Family(
        standard=dialects.mpt,
        names=_MPT_NAMES,
        defaults={"max_position_embeddings": 2048},
        gated=False,
        qkv_bias="biased",
        out_bias="biased",
        mlp_bias="biased",
        tied=True,
        rope="rotary",
        kinds=("multi-query",),
    ),
    "dbrx": Family(
        standard=dialects.dbrx,
        names=_MPT_NAMES,
        qkv_bias=False,
        out_bias=False,
        defaults={"max_position_embeddings": 2048},
        experts=Experts(width="intermediate_size"),
        kinds=("multi-query",),
    ),
    "opt": Family(
        standard=dialects.opt,
        names={"intermediate_size": ("ffn_dim",)},
        defaults={"enable_bias": True},
        grouped=False,
        gated=False,
        qkv_bias="enable_bias",
        out_bias="enable_bias",
        mlp_bias="enable_bias",
        norm_numbers=2,
        final_norm="has_final_norm",
        tied=True,
        positions=2,
        rope=False,
    ),
    "xglm": Family(
        **_ALL_BIASES,
        names={
            "hidden_size": ("d_model",),
            "intermediate_size": ("ffn_dim",),
            "num_hidden_layers": ("num_layers",),
            "num_attention_heads": ("attention_heads",),
        },
        grouped=False,
        gated=False,
        norm_numbers=2,
        tied=True,
        rope=False,
    ),
    "biogpt": Family(
        **_ALL_BIASES,
        grouped=False,
        gated=False,
        norm_numbers=2,
        tied=True,
        positions=2,
        rope=False,
    ),
    "persimmon": Family(
        **_ALL_BIASES,
        grouped=False,
        gated=False,
        qk_norm="qk_layernorm",
        qk_norm_bias=True,
        norm_numbers=2,
        defaults={"qk_layernorm": True},
    ),
    "falcon": _FALCON,
}
