"""Every family of the table against counts that are independent of this project's code.

`family_counts.json` has small made-up configurations with the numbers of `transformers` 5.24:
`params` counted over the modules of its model on the meta device, `active` without the experts
that a token does not use, `windowed` from the layer types of its configuration, `cache` the bytes
per token in bfloat16 of the cache that its model fills (null where it does not cache as engines
do: repeated heads of Falcon, the indexer's keys).
"""

import dataclasses
import json
from pathlib import Path

import pytest

from qkvjax.errors import UserError
from qkvjax.interop import huggingface
from qkvjax.interop.family_table import FAMILIES, SAME
from qkvjax.interop.latent import LatentSpec

COUNTS = json.loads((Path(__file__).parent / "family_counts.json").read_text())
PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "model_configs"  # may be absent
# Models with remote code: published number of parameters, and keys.
REMOTE_CODE = {
    "baichuan": (7_505_973_248, {"vocab_size": 125_696, "intermediate_size": 11_008}),
    "internlm": (7_321_948_160, {"vocab_size": 103_168, "intermediate_size": 11_008, "bias": True}),
    "internlm2": (
        7_737_708_544,
        {"vocab_size": 92_544, "intermediate_size": 14_336, "num_key_value_heads": 8},
    ),
    "qwen": (
        7_721_324_544,
        {"vocab_size": 151_936, "intermediate_size": 22_016, "kv_channels": 128, "no_bias": True},
    ),
}
CHATGLM3 = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "ffn_hidden_size": 13_696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "padded_vocab_size": 65_024,
    "seq_length": 8192,
}
DEEPSEEK_MOE_16B = {
    "model_type": "deepseek",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "vocab_size": 102_400,
}
MINICPM_2B = {
    "model_type": "minicpm",
    "hidden_size": 2304,
    "intermediate_size": 5760,
    "num_attention_heads": 36,
    "num_hidden_layers": 40,
    "vocab_size": 122_753,
}


def cache_bytes(model):
    total = 0
    for layer in model.layers:
        spec = layer.attention
        layout = None if isinstance(spec, LatentSpec) else "kv"
        total += 0 if layer.reuses_cache else spec.cache_bytes_per_token("bfloat16", layout)
    return total


def name(entry):
    return entry["config"]["model_type"]


@pytest.mark.parametrize("entry", COUNTS, ids=name)
def test_counts_are_those_of_the_modules(entry):
    model = huggingface.from_values(entry["config"])
    assert model.exact
    assert model.num_params == entry["params"]
    assert model.active_params == entry["active"]
    if entry["cache"] is not None:
        assert cache_bytes(model) == entry["cache"]
    if entry["windowed"] is not None:
        windowed = [layer.attention.window is not None for layer in model.layers]
        assert windowed == entry["windowed"]


@pytest.mark.parametrize("entry", COUNTS, ids=name)
def test_other_attention_put_in_and_taken_out_again_changes_nothing(entry):
    model = huggingface.from_values(entry["config"])
    specs = tuple(layer.attention for layer in model.layers)
    assert model.with_attention(specs).num_params == entry["params"]
    assert model.forward_macs(8) > 0
    assert model.weight_bytes(2) == 2 * entry["params"]


def test_every_family_is_counted_somewhere():
    remote_code = {*REMOTE_CODE, "chatglm", "deepseek", "minicpm"}
    like_mistral = {"ministral"}
    counted = {name(entry) for entry in COUNTS}
    assert set(FAMILIES) == counted | remote_code | like_mistral
    assert set(SAME.values()) <= set(FAMILIES)


@pytest.mark.parametrize("model_type", REMOTE_CODE)
def test_models_with_remote_code(model_type):
    expected, changes = REMOTE_CODE[model_type]
    common = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
    values = {"model_type": model_type, "tie_word_embeddings": False} | common | changes
    assert huggingface.from_values(values).num_params == expected


@pytest.mark.parametrize(
    "values, expected",
    [
        (CHATGLM3, 6_243_584_000),
        (DEEPSEEK_MOE_16B, 16_375_728_128),
        (MINICPM_2B, 2_724_880_896),
    ],
)
def test_further_models_with_remote_code(values, expected):
    model = huggingface.from_values(values)
    assert model.num_params == expected and model.exact


def test_chatglm_caches_its_groups():
    assert cache_bytes(huggingface.from_values(CHATGLM3)) == 28 * 2 * 2 * 128 * 2


FALCON = {
    "model_type": "falcon",
    "hidden_size": 8192,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "vocab_size": 65_024,
}


def test_falcon_heads_of_its_three_kinds():
    grouped = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 8}
    assert huggingface.from_values(grouped).num_params == 41_303_293_952  # 40B
    assert cache_bytes(huggingface.from_values(grouped)) == 60 * 2 * 8 * 64 * 2
    assert cache_bytes(huggingface.from_values(FALCON)) == 60 * 2 * 64 * 2
    plain = FALCON | {"multi_query": False}
    assert cache_bytes(huggingface.from_values(plain)) == 60 * 2 * 128 * 64 * 2
    first = {
        "model_type": "RefinedWeb",
        "hidden_size": 8192,
        "n_head": 128,
        "n_head_kv": 8,
        "n_layer": 60,
        "vocab_size": 65_024,
    }
    assert huggingface.from_values(first).num_params == 41_303_293_952


def test_a_sharing_ties_wide_norms_too():
    entry = next(one for one in COUNTS if name(one) == "olmo2")
    values = entry["config"] | {"num_key_value_heads": entry["config"]["num_attention_heads"]}
    model = huggingface.from_values(values)
    layer = model.layers[0]
    spec = layer.attention
    inner = spec.num_heads * spec.head_dim
    tied = dataclasses.replace(spec, sharing="q=k-v")
    changed = model.with_attention((tied,) * len(model.layers))
    bias = inner if spec.use_bias else 0
    saved = len(model.layers) * (spec.d_model * inner + bias + inner)
    assert model.num_params - changed.num_params == saved


def test_published_files():
    if not PUBLISHED.is_dir():
        pytest.skip("the published files are not beside this checkout")
    expected = json.loads((PUBLISHED / "expected.json").read_text())
    refused = {
        "bert-base-uncased",
        "gemma-3n-e2b",
        "minimax-text-01",
        "nemotron-h-8b",
        "t5-small",
        "zamba2-1.2b",
    }
    for name_, params in expected.items():
        path = PUBLISHED / f"{name_}.json"
        if name_ in refused:
            with pytest.raises(UserError, match="describes"):
                huggingface.read(path)
            continue
        model = huggingface.read(path)
        assert (model.num_params, model.exact) == (params, True), name_


def test_published_caches():
    if not PUBLISHED.is_dir():
        pytest.skip("the published files are not beside this checkout")
    kib = {"falcon-7b": 8, "deepseek-v3": 61 * (512 + 64) * 2 / 1024, "pythia-160m": 36}
    for name_, expected in kib.items():
        assert cache_bytes(huggingface.read(PUBLISHED / f"{name_}.json")) == expected * 1024
