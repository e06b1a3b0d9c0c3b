"""Parameter counts of published models, from their config.json alone."""

import json

import pytest

from qkvjax.errors import UserError
from qkvjax.interop import huggingface


def keys(model_type, d, f, layers, heads, kv_heads, vocab, tied, **others):
    return {
        "model_type": model_type,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        **others,
    }


LLAMA3_8B = keys("llama", 4096, 14336, 32, 32, 8, 128256, False)
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
    "n_inner": None,
}
GEMMA4_31B = {
    "model_type": "gemma4",
    "text_config": keys(
        "gemma4_text",
        5376,
        21504,
        60,
        32,
        16,
        262144,
        True,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=4,
        attention_k_eq_v=True,
        sliding_window=1024,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 10,
    ),
}
GEMMA4_E2B = keys(
    "gemma4_text",
    1536,
    6144,
    35,
    8,
    1,
    262144,
    True,
    head_dim=256,
    global_head_dim=512,
    sliding_window=512,
    hidden_size_per_layer_input=256,
    vocab_size_per_layer_input=262144,
    num_kv_shared_layers=20,
    use_double_wide_mlp=True,
    layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7,
)
QWEN3_30B = keys(
    "qwen3_moe",
    2048,
    6144,
    48,
    32,
    4,
    151936,
    False,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
MIXTRAL = keys(
    "mixtral", 4096, 14336, 32, 32, 8, 32000, False, num_local_experts=8, num_experts_per_tok=2
)
GPT_OSS_20B = keys(
    "gpt_oss",
    2880,
    2880,
    24,
    64,
    8,
    201088,
    False,
    head_dim=64,
    num_local_experts=32,
    num_experts_per_tok=4,
    attention_bias=True,
    sliding_window=128,
    layer_types=["sliding_attention", "full_attention"] * 12,
)

# The numbers of weights in the published checkpoints.
PUBLISHED = {
    "Llama-3-8B": (LLAMA3_8B, 8_030_261_248),
    "Llama-2-7B": (keys("llama", 4096, 11008, 32, 32, 32, 32000, False), 6_738_415_616),
    "Llama-3.2-1B": (
        keys("llama", 2048, 8192, 16, 32, 8, 128256, True, head_dim=64),
        1_235_814_400,
    ),
    "SmolLM2-135M": (keys("llama", 576, 1536, 30, 9, 3, 49152, True), 134_515_008),
    "Mistral-7B": (
        keys("mistral", 4096, 14336, 32, 32, 8, 32000, False, sliding_window=4096),
        7_241_732_096,
    ),
    "Mixtral-8x7B": (MIXTRAL, 46_702_792_704),
    "Phi-3-mini": (
        keys("phi3", 3072, 8192, 32, 32, 32, 32064, False, sliding_window=2047),
        3_821_079_552,
    ),
    "Qwen2.5-0.5B": (
        keys(
            "qwen2",
            896,
            4864,
            24,
            14,
            2,
            151936,
            True,
            sliding_window=32768,
            use_sliding_window=False,
            max_window_layers=24,
        ),
        494_032_768,
    ),
    "Qwen2-7B": (keys("qwen2", 3584, 18944, 28, 28, 4, 152064, False), 7_615_616_512),
    "Qwen3-8B": (keys("qwen3", 4096, 12288, 36, 32, 8, 151936, False, head_dim=128), 8_190_735_360),
    "Qwen3-30B-A3B": (QWEN3_30B, 30_532_122_624),
    "gpt-oss-20b": (GPT_OSS_20B, 20_914_757_184),
    "GPT-2": (GPT2, 124_439_808),
    "Gemma-7B": (keys("gemma", 3072, 24576, 28, 16, 16, 256000, None, head_dim=256), 8_537_680_896),
    "Gemma-2-2B": (keys("gemma2", 2304, 9216, 26, 8, 4, 256000, None, head_dim=256), 2_614_341_888),
    "Gemma-3-1B": (
        keys("gemma3_text", 1152, 6912, 26, 4, 1, 262144, None, head_dim=256, sliding_window=512),
        999_885_952,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_checkpoint(name):
    values, expected = PUBLISHED[name]
    model = huggingface.from_values(values)
    assert model.num_params == expected
    # The model's own attention put back changes nothing.
    specs = tuple(layer.attention for layer in model.layers)
    assert model.with_attention(specs).num_params == expected


def test_gemma4_ties_k_and_v_in_global_layers_only():
    model = huggingface.from_values(GEMMA4_31B)
    assert 30.6e9 < model.num_params < 30.8e9  # published as 30.7B
    kinds = [
        (s.sharing, s.window, s.num_kv_heads, s.head_dim)
        for s in (layer.attention for layer in model.layers)
    ]
    assert kinds[:6] == [("q-k-v", 1024, 16, 256)] * 5 + [("q-k=v", None, 4, 512)]
    assert any("language model" in note for note in model.notes)


def test_layers_that_borrow_a_cache_have_no_key_projection():
    model = huggingface.from_values(GEMMA4_E2B)
    assert sum(layer.reuses_cache for layer in model.layers) == 20
    # Published as 2.3B "effective": without the per-layer tables, of which a row is read.
    assert 2.2e9 < model.read_params(1) < 2.35e9
    per_layer_tables = 262144 * 35 * 256
    assert model.table_params == per_layer_tables
    unshared = dict(GEMMA4_E2B, num_kv_shared_layers=0, use_double_wide_mlp=False)
    every = huggingface.from_values(unshared)
    # 16 sliding and 4 global layers borrow: they have wider MLPs, and no K and V projections.
    absent = 16 * (2 * 1536 * 256 + 256) + 4 * (2 * 1536 * 512 + 512)
    assert model.num_params - every.num_params == 20 * 3 * 1536 * 6144 - absent


def test_active_parameters_and_what_a_batch_reads():
    moe = huggingface.from_values(MIXTRAL)
    expert = 3 * 4096 * 14336
    assert moe.num_params - moe.active_params == 32 * 6 * expert
    lookup = 32000 * 4096
    assert moe.read_params(1) == moe.active_params - lookup
    assert moe.read_params(1) < moe.read_params(2) < moe.read_params(10_000)
    assert moe.read_params(10_000) == pytest.approx(moe.num_params - lookup)
    assert 3.3e9 < huggingface.from_values(QWEN3_30B).active_params < 3.4e9  # "A3.3B"
    # 3.6B without the embedding, as its card counts.
    assert 3.60e9 < huggingface.from_values(GPT_OSS_20B).read_params(1) < 3.62e9


def test_only_some_layers_have_experts():
    values = dict(QWEN3_30B, mlp_only_layers=[1], decoder_sparse_step=2)
    model = huggingface.from_values(values)
    with_experts = [i for i, layer in enumerate(model.layers) if layer.num_experts]
    assert with_experts == list(range(3, 48, 2))
    assert model.layers[0].dense_params > 3 * 2048 * 6144


def test_forward_macs_of_one_token_are_its_matrices():
    model = huggingface.from_values(LLAMA3_8B)
    norms = 65 * 4096
    assert model.forward_macs(1) == 8_030_261_248 - 128256 * 4096 - norms + 32 * 2 * 4096


def windows(values):
    return [layer.attention.window for layer in huggingface.from_values(values).layers]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"model_type": "mistral", "sliding_window": 64}, [64] * 6),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 6),
        ({"model_type": "llama", "sliding_window": 64}, [None] * 6),
        ({"model_type": "gemma2", "sliding_window": 64}, [64, None] * 3),
        ({"model_type": "gemma3_text", "sliding_window": 64}, [64] * 5 + [None]),
        (
            {"model_type": "gemma3_text", "sliding_window": 64, "sliding_window_pattern": 3},
            [64, 64, None] * 2,
        ),
        ({"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": False}, [None] * 6),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 4,
            },
            [None] * 4 + [64] * 2,
        ),
        ({"model_type": "gpt_oss", "sliding_window": 64}, [64, None] * 3),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 64,
                "layer_types": ["full_attention"] * 5 + ["sliding_attention"],
            },
            [None] * 5 + [64],
        ),
    ],
)
def test_windows_of_each_layer(changes, expected):
    assert windows(keys("", 64, 128, 6, 4, 2, 100, True, head_dim=16) | changes) == expected


def test_absent_keys_take_the_defaults_of_their_class_and_say_so():
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    model = huggingface.from_values({"model_type": "gemma3", "text_config": text})
    assert model.num_params == 3_880_263_168
    assert any("num_attention_heads=8" in note for note in model.notes)


def test_unknown_type_is_counted_like_llama_and_says_so():
    model = huggingface.from_values(LLAMA3_8B | {"model_type": "newcomer"})
    assert model.num_params == 8_030_261_248
    assert any("'newcomer' is not known" in note for note in model.notes)


@pytest.mark.parametrize(
    "values, message",
    [
        ({k: v for k, v in LLAMA3_8B.items() if k != "num_hidden_layers"}, "'num_hidden_layers'"),
        ({k: v for k, v in MIXTRAL.items() if k != "num_experts_per_tok"}, "'num_experts_per_tok'"),
        (
            {k: v for k, v in QWEN3_30B.items() if k != "moe_intermediate_size"},
            "'moe_intermediate_size'",
        ),
        (MIXTRAL | {"num_experts_per_tok": 9}, "9 experts a token"),
        (QWEN3_30B | {"mlp_only_layers": 3}, "must be a list"),
        (LLAMA3_8B | {"hidden_size": "wide"}, "'hidden_size' is 'wide'"),
        (LLAMA3_8B | {"hidden_size": True}, "'hidden_size' is True"),
        (LLAMA3_8B | {"vocab_size": 0}, "'vocab_size' is 0"),
        (LLAMA3_8B | {"num_key_value_heads": 5}, "does not divide"),
        (LLAMA3_8B | {"layer_types": ["full_attention"]}, "each of the 32 layers"),
        (LLAMA3_8B | {"layer_types": ["linear_attention"] * 32}, "'linear_attention'"),
        (LLAMA3_8B | {"kv_lora_rank": 512}, "latent"),
        ({"text_config": {"model_type": "llama"}}, "text_config.'num_hidden_layers'"),
    ],
)
def test_what_cannot_be_counted_names_the_key(values, message):
    with pytest.raises(UserError) as error:
        huggingface.from_values(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_reads_a_file_or_its_folder(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2))
    assert huggingface.read(path) == huggingface.read(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "3", "\xff"])
def test_files_that_hold_no_object(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="is not (a )?JSON"):
        huggingface.read(path)


def test_a_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match="hf download"):
        huggingface.read(tmp_path / "meta-llama" / "Llama-3-8B")
