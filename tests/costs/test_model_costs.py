"""`plan --model` as a command: estimates, latents, chunks, quantised files, refusals."""

import json

import pytest
from published_models import GPT2, LLAMA3_8B

from qkvjax.commands import plan

WEIGHTS = 2 * 8_030_261_248
MEMORY = 80 * 10**9


@pytest.fixture
def planned(tmp_path, capsys):
    """Returns a function that plans the keys of a config.json and returns (record, text)."""

    def run(values, *flags):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        code = plan.main([f"--model={path}", f"--workdir={tmp_path / 'out'}", *flags])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        assert max(map(len, out.splitlines()[:-1])) <= 110
        return json.loads((tmp_path / "out" / "plan.json").read_text()), out

    return run


def test_exact_counts_say_so(planned):
    record, text = planned(LLAMA3_8B)
    assert record["exact"] is True and record["estimate"] is None
    assert record["weight_bytes"] == WEIGHTS
    assert "≈" not in text


def test_an_estimate_is_marked_in_every_figure_and_in_the_first_line(planned):
    record, text = planned(LLAMA3_8B | {"model_type": "newcomer", "rope_theta": 5e5})
    assert record["exact"] is False
    assert "'newcomer' is not known" in record["estimate"]
    lines = text.splitlines()
    assert lines[0].startswith("≈ estimate") and "'newcomer' is not known" in lines[0]
    for label in ("parameters", "weights", "forward"):
        line = next(line for line in lines if line.startswith(label))
        assert line.removeprefix(label).strip().startswith("≈"), line
    assert "≈59.5 GiB left" in text.replace("\u00a0", " ")
    rows = [line for line in lines if line.startswith("Q") and "(" in line]
    assert len(rows) == len(record["rows"])
    for row in rows:
        figures = row.replace("\u00a0", "").partition(")")[2].split()
        assert figures and all(cell == "–" or cell.startswith("≈") for cell in figures), row


LATENT = {
    "model_type": "deepseek_v3",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
}


def test_latent_attention_has_one_row_by_its_latent(planned):
    record, text = planned(LATENT)
    (row,) = record["rows"]
    assert (row["name"], row["sharing"], row["layout"]) == ("MLA", "latent", "latent")
    assert row["cache_bytes_per_token"] == record["cache_bytes_per_token"] == 6 * 2 * 576
    assert row["as_is"] and row["params_saved"] == 0
    assert record["exact"] is True
    assert "MLA" in text and "from one latent already" in text and "K=V with RoPE" not in text


def test_an_indexer_reads_less_than_it_holds(planned):
    sparse = LATENT | {"model_type": "deepseek_v32", "index_n_heads": 4, "index_head_dim": 64}
    record, text = planned(sparse | {"index_topk": 64}, "--context=4096")
    (row,) = record["rows"]
    assert row["cache_bytes_at_context"] == 6 * 4096 * 2 * (576 + 64)
    dense, _ = planned(sparse | {"index_topk": 4096}, "--context=4096")
    speeds = [one["rows"][0]["tokens_per_second_most_users"] for one in (record, dense)]
    assert speeds[0] > 2 * speeds[1]
    assert "indexer" in text


def test_chunks_bound_the_cache(planned):
    values = LLAMA3_8B | {
        "model_type": "llama4_text",
        "intermediate_size_mlp": 1024,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 1024,
    }
    record, _ = planned(values)
    a_layer = 131_072 // 32
    assert record["rows"][0]["cache_bytes_at_context"] == a_layer * (8 * 8192 + 24 * 1024)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def test_a_quantised_file_is_counted_at_its_own_width(planned):
    values = LLAMA3_8B | {"quantization_config": GPTQ}
    record, text = planned(values)
    matrices = 8_030_261_248 - 2 * 128_256 * 4096 - 65 * 4096
    expected = matrices * (4 + 20 / 128) / 8 + 2 * (2 * 128_256 * 4096 + 65 * 4096)
    assert record["weight_bytes"] == round(expected)
    assert record["weight_dtype"] == "gptq"
    assert "as the file stores them: gptq" in text
    assert record["rows"][0]["users"] == int((MEMORY - expected) // (8192 * 131_072))
    record, text = planned(values, "--weight_dtype=bfloat16")
    assert record["weight_bytes"] == WEIGHTS
    assert record["weight_dtype"] == "bfloat16"
    assert "--weight_dtype replaces the file's width (gptq)" in text


def test_gpt_oss_120b_is_61_gib(planned):
    values = {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "vocab_size": 201_088,
        "max_position_embeddings": 131_072,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    record, text = planned(values)
    assert record["num_params"] == 116_829_156_672
    assert 60.5 < record["weight_bytes"] / 2**30 < 61.5
    assert "mxfp4" in text


def test_the_language_model_of_a_larger_one_is_counted_and_that_is_said(planned):
    record, text = planned({"model_type": "llava", "text_config": LLAMA3_8B, "vision_config": {}})
    assert record["num_params"] == 8_030_261_248
    assert "language model alone" in record["counted"]
    assert "counted" in text.splitlines()[1] and "left out" in text.splitlines()[1]


@pytest.mark.parametrize(
    "values, message",
    [
        (LLAMA3_8B | {"hybrid_override_pattern": "M*"}, "state-space"),
        (LLAMA3_8B | {"architectures": ["NewForMaskedLM"]}, "decodes no text"),
        (GPT2 | {"model_type": "new_gpt"}, "laid out like Llama's"),
        (LLAMA3_8B | {"quantization_config": {"quant_method": "aqlm"}}, "--weight_dtype"),
    ],
)
def test_what_is_not_counted_is_one_line_and_code_2(tmp_path, capsys, values, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert plan.main([f"--model={path}", f"--workdir={tmp_path / 'out'}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_width_is_planned_in_a_given_one(planned):
    values = LLAMA3_8B | {"quantization_config": {"quant_method": "aqlm"}}
    record, _ = planned(values, "--weight_dtype=int8")
    assert record["weight_bytes"] == WEIGHTS // 2
