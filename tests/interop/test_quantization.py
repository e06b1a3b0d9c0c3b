"""Quantised files are counted at the width of the file, by which modules are quantised."""

import dataclasses

import pytest

from qkvjax.interop import huggingface, quantization

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
ATTENTION = 2 * 64 * 64 + 2 * 64 * 32
FEED_FORWARD = 3 * 64 * 128
MATRICES = 3 * (ATTENTION + FEED_FORWARD)
NORMS = 7 * 64
TABLE = 64 * 100
MOE = LLAMA | {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
CT = {
    "quant_method": "compressed-tensors",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": 32, "type": "int", "symmetric": True},
        }
    },
}


def quantised(config, values=LLAMA):
    return huggingface.from_values(values | {"quantization_config": config})


def bits(config):
    return quantization.read({"quantization_config": config}).bits


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2),
        ({"quant_method": "fp8", "activation_scheme": "static"}, 8),
        ({"quant_method": "fbgemm_fp8"}, 8),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"load_in_4bit": True}, 4.5),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 4 + 8 / 64 + 32 / 64 / 256),
        (CT, 4.5),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}, 8),
        ({"quant_method": "bitnet"}, 2),
        ({"quant_method": "aqlm"}, None),
        ({"quant_method": "gptq"}, None),
        (CT | {"sparsity_config": {"format": "marlin-24"}}, None),
        ({"quant_method": "fp8", "ignored_layers": ["re:("]}, None),
    ],
)
def test_bits_of_a_number(config, expected):
    assert bits(config) == (expected if expected is None else pytest.approx(expected))


def test_groups_that_differ_are_not_guessed():
    eight = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8}}
    groups = CT["config_groups"] | {"group_1": eight}
    assert bits(CT | {"config_groups": groups}) is None


def test_matrices_are_narrow_and_the_rest_is_not():
    model = quantised({"quant_method": "gptq", "bits": 4, "group_size": 128})
    narrow = MATRICES * (4 + 20 / 128) / 8
    assert model.weight_bytes(None) == pytest.approx(narrow + 2 * (2 * TABLE + NORMS))
    assert model.weight_bytes(2) == 2 * model.num_params
    # A step reads one row of the embedding, and everything else.
    assert model.weight_bytes(None) - model.read_bytes(1, None) == 2 * TABLE


def test_experts_alone_are_narrow_in_mxfp4():
    model = quantised({"quant_method": "mxfp4"}, MOE)
    experts = 3 * 4 * FEED_FORWARD
    others = model.num_params - experts
    assert model.weight_bytes(None) == pytest.approx(experts * 4.25 / 8 + 2 * others)
    read = 2 * (others - TABLE) + experts * 4.25 / 8 / 2  # two of four experts
    assert model.read_bytes(1, None) == pytest.approx(read)


@pytest.mark.parametrize(
    "skipped, kept",
    [
        (["lm_head"], 0),
        (["re:.*self_attn.*"], 3 * ATTENTION),
        (["*self_attn*"], 3 * ATTENTION),
        (["model.layers.1.mlp"], FEED_FORWARD),
        (["model.layers.1"], FEED_FORWARD + ATTENTION),
        (["model.layers.*.mlp"], 3 * FEED_FORWARD),
        (["gate"], 0),
        (["model.language_model.layers.2.self_attn"], ATTENTION),
    ],
)
@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_modules_that_the_file_leaves_alone(key, skipped, kept):
    model = quantised({"quant_method": "fp8", key: skipped})
    expected = MATRICES + kept + 2 * (2 * TABLE + NORMS)
    assert model.weight_bytes(None) == pytest.approx(expected)


def test_the_head_is_narrow_where_the_method_does_not_leave_it():
    kept = quantised(CT)
    narrow = quantised(CT | {"ignore": []})
    assert kept.weight_bytes(None) - narrow.weight_bytes(None) == pytest.approx(
        TABLE * (2 - 4.5 / 8)
    )
    tied = quantised(CT | {"ignore": []}, LLAMA | {"tie_word_embeddings": True})
    assert tied.weight_bytes(None) == pytest.approx(MATRICES * 4.5 / 8 + 2 * (TABLE + NORMS))


def test_other_attention_keeps_the_width():
    model = quantised({"quant_method": "fp8"})
    tied = [dataclasses.replace(one.attention, sharing="q-k=v") for one in model.layers]
    saved = model.weight_bytes(None) - model.with_attention(tuple(tied)).weight_bytes(None)
    assert saved == 3 * 64 * 32


def test_a_file_that_is_not_quantised():
    assert quantization.read(LLAMA) is None
    assert quantization.read(LLAMA | {"quantization_config": None}) is None
    assert huggingface.from_values(LLAMA).quantization is None
