"""Latent attention: parameters and caches by hand."""

import pytest

from qkvjax.interop import huggingface
from qkvjax.interop.latent import LatentSpec

# DeepSeek-V3's attention.
V3 = LatentSpec(
    d_model=7168,
    num_heads=128,
    kv_rank=512,
    query_rank=1536,
    rope_dim=64,
    nope_dim=128,
    value_dim=128,
)


def test_parameters_by_hand():
    queries = 7168 * 1536 + 1536 + 1536 * 128 * 192
    latents = 7168 * 576 + 512 + 512 * 128 * 256
    assert V3.num_params == queries + latents + 128 * 128 * 7168
    assert V3.num_params - V3.matrix_params == 1536 + 512


def test_the_cache_is_the_latent_and_one_rotary_key():
    assert V3.cache_bytes_per_token() == 2 * (512 + 64)
    assert V3.cache_bytes_per_token("float32") == 4 * (512 + 64)
    assert V3.cache_bytes_per_token("int8") == 512 + 64 + 2
    assert V3.reads("bfloat16") == [(1152, None)]


def test_multiply_adds_of_one_token_are_the_matrices_and_one_pair():
    assert V3.forward_macs(1) == V3.matrix_params + 128 * (192 + 128)


def test_an_indexer_bounds_what_is_read_and_caches_its_keys():
    values = {
        "model_type": "deepseek_v32",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_topk": 32,
        "index_n_heads": 2,
        "index_head_dim": 16,
    }
    spec = huggingface.from_values(values).layers[0].attention
    assert spec.cache_bytes_per_token() == 2 * (16 + 4 + 16)
    assert spec.reads("bfloat16") == [(40, 32), (32, None)]
    pairs = spec.forward_macs(1000) - 1000 * spec.matrix_params
    assert pairs == 1000 * 32 * 4 * (12 + 8) + 1000 * 1000 * 2 * 16


@pytest.mark.parametrize("rank", [None, 24])
def test_an_explicit_null_is_no_default(rank):
    values = {
        "model_type": "deepseek_v2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "q_lora_rank": rank,
    }
    model = huggingface.from_values(values)
    assert model.layers[0].attention.query_rank == rank
    del values["q_lora_rank"]
    model = huggingface.from_values(values)
    assert model.layers[0].attention.query_rank == 1536
    assert any("q_lora_rank=1536" in note for note in model.notes)
