"""Files of another kind are recognised by their keys, whatever their model_type says."""

import pytest

from qkvjax.errors import UserError
from qkvjax.interop import huggingface

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
# What a file of each kind has besides the keys of Llama, and a word of the refusal.
KINDS = {
    "nemotron_h": ({"hybrid_override_pattern": "M-M*M-M-", "mamba_num_heads": 4}, "state-space"),
    "zamba2": ({"hybrid_layer_ids": [2, 5]}, "state-space"),
    "jamba": ({"attn_layer_period": 8, "attn_layer_offset": 4}, "state-space"),
    "bamba": ({"attn_layer_indices": [3]}, "state-space"),
    "granite hybrid": ({"layers_block_type": ["mamba"] * 8}, "state-space"),
    "falcon_h1": ({"mamba_d_ssm": 64}, "state-space"),
    "recurrentgemma": ({"block_types": ["recurrent", "recurrent", "attention"]}, "state-space"),
    "recurrentgemma's width": ({"lru_width": 64}, "state-space"),
    "minimax": ({"attn_type_list": [0, 0, 0, 1] * 2}, "state-space"),
    "qwen3_next": ({"full_attention_interval": 4}, "state-space"),
    "kimi_linear": ({"linear_attn_config": {"kda_layers": [1]}}, "state-space"),
    "lfm2": ({"conv_L_cache": 3}, "state-space"),
    "lfm2's layers": ({"layer_types": ["conv"] * 8}, "'conv'"),
    "mamba": ({"state_size": 16}, "state-space"),
    "mllama": ({"cross_attention_layers": [3]}, "cross attention"),
    "gpt2 of an encoder-decoder": ({"add_cross_attention": True}, "cross attention"),
    "t5": ({"is_encoder_decoder": True}, "encoder-decoder"),
    "bart": ({"encoder_layers": 6, "decoder_layers": 6}, "encoder-decoder"),
    "nested": ({"encoder": {"hidden_size": 1}, "decoder": {}}, "encoder-decoder"),
    "bert": ({"type_vocab_size": 2}, "encoder"),
    "an embedding model": ({"use_bidirectional_attention": True}, "both directions"),
    "masked": ({"architectures": ["NewForMaskedLM"]}, "decodes no text"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "decodes no text"),
    "chunked": ({"attention_chunk_size": 32}, "chunked attention"),
    "multi-query": ({"multi_query": True}, "key-value heads"),
    "grouped": ({"num_kv_heads": 2}, "key-value heads"),
    "experts": ({"num_experts": 8, "moe_intermediate_size": 32}, "mixture of experts"),
    "ernie": ({"moe_num_experts": 8}, "mixture of experts"),
    "llama 4": ({"interleave_moe_layer_step": 2}, "mixture of experts"),
    "half of a latent": ({"kv_lora_rank": 16}, "latent"),
    "indexer": (LATENT | {"index_topk": 64, "index_n_heads": 2}, "indexer"),
    "DeciLM": ({"block_configs": [{}]}, "differ"),
    "Hunyuan Large": ({"use_cla": True, "cla_share_factor": 2}, "differ"),
    "Ouro": ({"total_ut_steps": 4}, "differ"),
    "gemma3n": ({"altup_num_inputs": 4}, "streams"),
    "EAGLE": ({"draft_vocab_size": 32}, "draft"),
    "phi3small": ({"blocksparse_block_size": 64}, "sparse"),
    "MTP of DeepSeek-V4": ({"compress_ratios": [4, 128]}, "compressed"),
}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "newcomer", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_refused_under_any_name(kind, model_type):
    keys, word = KINDS[kind]
    with pytest.raises(UserError) as error:
        huggingface.from_values(LLAMA | {"model_type": model_type} | keys)
    message = str(error.value)
    assert word in message or (model_type in ("newcomer", "") and "laid out" in message)
    assert error.value.code == 2
    assert "\n" not in message
    assert "give" in message
    assert "add it" not in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model_of_several_parts_is_looked_at_too(kind):
    keys, _ = KINDS[kind]
    if "architectures" in keys:
        pytest.skip("the outer file names the class")
    nested = {"model_type": "any_vl", "text_config": LLAMA | {"model_type": "llama"} | keys}
    with pytest.raises(UserError):
        huggingface.from_values(nested)


@pytest.mark.parametrize(
    "keys",
    [
        {"is_encoder_decoder": False, "add_cross_attention": False, "chunk_size_feed_forward": 0},
        {"attention_chunk_size": None, "num_experts": None, "kv_lora_rank": None},
        {"cross_attention_hidden_size": None, "type_vocab_size": None, "mamba_d_state": None},
        {"num_local_experts": 1, "moe_intermediate_size": 0, "multi_query": False},
        {"use_bidirectional_attention": False, "layer_types": ["full_attention"] * 8},
    ],
)
def test_keys_that_switch_nothing_on_refuse_nothing(keys):
    plain = huggingface.from_values(LLAMA | {"model_type": "llama"})
    assert huggingface.from_values(LLAMA | {"model_type": "llama"} | keys) == plain


def test_minimax_m2_has_the_list_of_hybrids_with_attention_everywhere():
    values = LLAMA | {"model_type": "minimax_m2", "attn_type_list": [1] * 8}
    values |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    assert huggingface.from_values(values).exact
    with pytest.raises(UserError, match="state-space"):
        huggingface.from_values(values | {"attn_type_list": [1] * 7 + [0]})


def test_an_unknown_family_like_llama_is_an_estimate():
    known = huggingface.from_values(LLAMA | {"model_type": "llama"})
    model = huggingface.from_values(LLAMA | {"model_type": "newcomer"})
    assert model.num_params == known.num_params
    assert known.exact and not model.exact
    assert "'newcomer' is not known" in model.estimate


def test_an_unknown_family_like_deepseek_is_an_estimate_by_its_latent():
    values = LLAMA | LATENT | {"model_type": "newcomer"}
    model = huggingface.from_values(values)
    assert "DeepSeek-V3" in model.estimate
    spec = model.layers[0].attention
    assert spec.cache_bytes_per_token() == (16 + 4) * 2
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = huggingface.from_values(values | experts | {"first_k_dense_replace": 1})
    assert [layer.num_experts for layer in model.layers] == [0] + [4] * 7
    with pytest.raises(UserError, match="moe_num_experts"):
        huggingface.from_values(values | {"moe_num_experts": 4})


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"intermediate_size": None}, "'intermediate_size'"),
        ({"intermediate_size": [1, 2]}, "'intermediate_size'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"hidden_act": "relu2"}, "'relu2'"),
        ({"layer_norm_eps": 1e-5}, "'layer_norm_eps'"),
        ({"parallel_attn": True}, "'parallel_attn'"),
        ({"sliding_window": 64}, "which layers"),
        ({"expert_layer_period": 2}, "'expert_layer_period'"),
        ({"patch_size": 14}, "'patch_size'"),
        ({"model_type": "some_encoder"}, "encoder"),
        ({"layer_types": ["sliding_attention"] * 8}, "'sliding_window'"),
    ],
)
def test_an_unknown_family_unlike_llama_is_refused_without_advice_to_add(changes, word):
    with pytest.raises(UserError) as error:
        huggingface.from_values(LLAMA | {"model_type": "newcomer"} | changes)
    message = str(error.value)
    assert word in message
    assert "docs/reference/plan.md" in message
    assert "add it" not in message


def test_bert_without_its_telling_keys_is_no_llama():
    values = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "vocab_size": 30_522,
        "max_position_embeddings": 512,
    }
    with pytest.raises(UserError, match="laid out"):
        huggingface.from_values(values)


def test_clip_is_refused_although_it_has_a_text_config():
    text = LLAMA | {"model_type": "clip_text_model"}
    with pytest.raises(UserError, match="projection_dim"):
        huggingface.from_values({"model_type": "clip", "projection_dim": 8, "text_config": text})


def test_the_class_decides_where_there_is_no_type():
    values = {"architectures": ["GPTJForCausalLM"], "n_embd": 64, "n_head": 4, "n_layer": 2}
    values |= {"n_positions": 64, "vocab_size": 100, "rotary_dim": 8}
    model = huggingface.from_values(values)
    assert model.model_type == "gptj" and model.exact
    with pytest.raises(UserError):
        huggingface.from_values({k: v for k, v in values.items() if k != "architectures"})


def test_another_class_than_the_types_makes_an_estimate():
    values = LLAMA | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert huggingface.from_values(values).exact
    for name in ("LlamaModel", "SomethingForCausalLM"):
        model = huggingface.from_values(values | {"architectures": [name]})
        assert name in model.estimate
