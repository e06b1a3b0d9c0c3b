"""The command `plan`: its table, its record, its errors."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_models import GPT2, LLAMA3_8B

from qkvjax.commands import plan
from qkvjax.costs import roofline

ROOT = Path(__file__).parents[2]
GEMMA4_31B = {
    "model_type": "gemma4_text",
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "num_global_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
    "vocab_size": 262144,
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "tie_word_embeddings": True,
}
WEIGHTS = 2 * 8_030_261_248
MEMORY = 80 * 10**9
BANDWIDTH = 3.35e12


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


def by_name(record):
    return {(row["sharing"], row["heads"]): row for row in record["rows"]}


def test_llama3_by_hand(planned):
    record, text = planned(LLAMA3_8B)
    assert record["num_params"] == 8_030_261_248
    assert record["cache_bytes_per_token"] == 131_072
    assert record["context"] == 8192
    assert record["command"].startswith("qkvjax plan --model=")
    rows = by_name(record)
    sizes = {key: row["cache_bytes_per_token"] // 1024 for key, row in rows.items()}
    assert sizes == {
        ("q-k-v", "as is"): 128,
        ("q-k=v", "as is"): 64,
        ("q-k-v", "half"): 64,
        ("q-k=v", "half"): 32,
        ("q-k-v", "MQA"): 16,
        ("q-k=v", "MQA"): 8,
    }
    tied = rows["q-k=v", "as is"]
    assert tied["cache_saved"] == 0.5
    assert tied["params_saved"] == 32 * 4096 * 8 * 128
    assert (tied["layout"], tied["num_kv_heads"]) == ("shared", 8)
    base = rows["q-k-v", "as is"]
    assert base["as_is"] and not tied["as_is"]
    assert base["longest_context"] == (MEMORY - WEIGHTS) // 131_072
    assert base["users"] == (MEMORY - WEIGHTS) // (8192 * 131_072) == 59
    read = WEIGHTS - 2 * 128256 * 4096  # only one row of the embedding is read
    one, many = base["tokens_per_second_1_user"], base["tokens_per_second_most_users"]
    assert one == pytest.approx(BANDWIDTH / (read + 2**30))
    assert many == pytest.approx(59 * BANDWIDTH / (read + 59 * 2**30))
    assert "8 for 32" in text and "not a measurement" in text and "trained in" in text


def test_all_sharings_where_queries_and_keys_have_the_same_heads(planned):
    record, text = planned(GPT2)
    rows = by_name(record)
    full = [sharing for sharing, heads in rows if heads == "as is"]
    assert full == ["q-k-v", "q-k=v", "q=k-v", "q=v-k", "q=k=v"]
    assert [s for s, heads in rows if heads == "half"] == ["q-k-v", "q-k=v"]
    projection = 12 * (768 * 768 + 768)
    assert rows["q=k=v", "as is"]["params_saved"] == 2 * projection
    assert rows["q=k-v", "as is"]["cache_saved"] == 0
    assert rows["q-k=v", "MQA"]["cache_saved"] == pytest.approx(1 - 1 / 24)
    assert "RoPE" not in text and "No rows" not in text


def test_already_mqa_has_no_fewer_heads(planned):
    record, _ = planned(LLAMA3_8B | {"num_key_value_heads": 1})
    assert list(by_name(record)) == [("q-k-v", "as is"), ("q-k=v", "as is")]
    record, text = planned(
        LLAMA3_8B | {"num_attention_heads": 24, "num_key_value_heads": 3, "head_dim": 128}
    )
    assert {heads for _, heads in by_name(record)} == {"as is", "MQA"}
    assert "3 cannot be halved" in text


def test_windows_bound_the_cache(planned):
    mistral = LLAMA3_8B | {
        "model_type": "mistral",
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
    }
    record, text = planned(mistral)
    assert record["rows"][0]["cache_bytes_at_context"] == 4096 * 131_072
    assert record["rows"][0]["longest_context"] is None
    assert "any" in text


def test_gemma4_as_engines_store_it_and_with_one_tensor(planned):
    record, text = planned(GEMMA4_31B, "--context=100000")
    engine, once = record["rows"][:2]
    local, wide = 2 * 16 * 256 * 2, 2 * 4 * 512 * 2
    assert engine["cache_bytes_per_token"] == 50 * local + 10 * wide
    assert engine["cache_bytes_at_context"] == 50 * local * 1024 + 10 * wide * 100_000
    assert once["cache_bytes_at_context"] == 50 * local * 1024 + 5 * wide * 100_000
    assert engine["num_params"] == once["num_params"]
    assert engine["num_kv_heads"] == [16, 4] and once["layout"] == ["kv", "shared"]
    assert "10 of 60 layers have one projection for K and V" in text


def test_flags_change_what_they_name(planned):
    base = planned(LLAMA3_8B)[0]["rows"][0]
    record, text = planned(
        LLAMA3_8B,
        "--memory=141GiB",
        "--bandwidth=4.8TB/s",
        "--context=4096",
        "--cache_dtype=int8",
        "--weight_dtype=float32",
    )
    row = record["rows"][0]
    assert record["memory_bytes"] == 141 * 2**30
    scales = 2 * 2 * 8 * 32  # two bytes for each head of two tensors in every layer
    assert (row["cache_bytes_per_token"] - scales) * 2 == base["cache_bytes_per_token"]
    assert row["users"] == (141 * 2**30 - 2 * WEIGHTS) // (4096 * (65_536 + scales))
    assert "scales" in text and "H100" not in text


def test_weights_that_do_not_fit(planned):
    record, text = planned(LLAMA3_8B, "--memory=16GB")
    row = record["rows"][0]
    assert (row["users"], row["longest_context"]) == (0, 0)
    assert row["tokens_per_second_1_user"] is None
    assert "too small for the weights" in text


def test_long_models_are_planned_at_a_sensible_context(planned):
    record, text = planned(LLAMA3_8B | {"max_position_embeddings": 10_485_760})
    assert record["context"] == 131_072
    assert "made for 10,485,760" in text


CONFIG = f"--config={ROOT}/configs/lm.py:depth=4"


def test_config_by_hand(tmp_path, capsys):
    assert plan.main([CONFIG, f"--workdir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 110
    record = json.loads((tmp_path / "plan.json").read_text())
    # 264 rows of 256; a block has 4 projections, 3 matrices of 256 x 704, 2 norms, 2 gains of 64.
    block = 4 * 256 * 256 + 3 * 256 * 704 + 2 * 256 + 2 * 64
    assert record["num_params"] == 264 * 256 + 4 * block + 256
    matrices = 4 * (4 * 256 * 256 + 3 * 256 * 704) + 264 * 256
    assert record["forward_macs"] == 256 * matrices + 4 * 2 * 256 * 256 * 256
    assert record["cache_bytes_per_token"] == 4 * 2 * 256 * 2
    assert record["train_flops"] == 1000 * 16 * 256 * 6 * record["forward_macs"] // 256
    rows = by_name(record)
    assert len(rows) == 9
    assert rows["q-k=v", "as is"]["params_saved"] == 4 * 256 * 256
    assert rows["q=k-v", "as is"]["params_saved"] == 4 * (256 * 256 + 64)  # and one norm's gain
    intensity = {key: row["decode_arithmetic_intensity"] for key, row in rows.items()}
    assert intensity["q-k-v", "as is"] == 1 and intensity["q-k=v", "MQA"] == 8
    assert [row["sharing"] for row in record["rows"] if row["as_is"]] == ["q-k-v"]


def test_config_marks_its_own_sharing(capsys):
    assert plan.main([CONFIG + ",sharing=q-k=v", "--config.train.steps=2ep"]) == 0
    out = capsys.readouterr().out
    marked = [line for line in out.splitlines() if " * " in line and line.startswith("Q")]
    assert len(marked) == 1 and marked[0].startswith("Q-K=V *")
    assert "2ep of data that plan does not read" in out


def test_config_with_layers_that_differ(capsys):
    pattern = "({'sharing': 'q-k=v', 'window': None}, {'window': 64})"
    assert plan.main([CONFIG, f"--config.model.layer_overrides={pattern}"]) == 0
    out = capsys.readouterr().out
    assert "as is *" in out and "as is    2 (half)" in out


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give --model="),
        (["--model={m}", CONFIG], "not both"),
        (["--model=nowhere.json"], "is not a file: --model takes"),
        (["--model={m}", "--memory=80XB"], "--memory='80XB' is not a size"),
        (["--model={m}", "--memory=0GB"], "is not a size"),
        (["--model={m}", "--memory=-1GB"], "is not a size"),
        (["--model={m}", "--memory=3.35TB/s"], "is not a size"),
        (["--model={m}", "--bandwidth=fast"], "is not a bandwidth"),
        (["--model={m}", "--cache_dtype=int3"], "'int3' is unknown"),
        (["--model={m}", "--weight_dtype=int3"], "'int3' is unknown"),
        (["--model={m}", "--context=many"], "--context=many"),
        (["--model={m}", "--context=0"], "--context=0"),
        (["--model={m}", "--context=1025"], "1024 learned positions"),
        (["--model={m}", "--workdir={m}/below"], "check the path"),
        (["--modle={m}"], "did you mean 'model'?"),
        ([CONFIG + ",sharing=q-k-w"], "not a partition"),
        ([CONFIG, "--memory=80GB"], "goes with --model"),
        ([CONFIG, "--config.train.steps=5%"], "train.steps"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, flags, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2))
    assert plan.main([flag.replace("{m}", str(path)) for flag in ["plan", *flags]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err and len(err.splitlines()) == 1 and err.startswith("error: ")


def test_a_file_without_a_context_asks_for_one(tmp_path, capsys):
    path = tmp_path / "config.json"
    values = {k: v for k, v in LLAMA3_8B.items() if k != "max_position_embeddings"}
    path.write_text(json.dumps(values))
    assert plan.main([f"--model={path}"]) == 2
    assert "'max_position_embeddings': give --context" in capsys.readouterr().err
    assert plan.main([f"--model={path}", "--context=100"]) == 0


def test_nothing_is_left_of_a_failed_write(tmp_path, capsys):
    (tmp_path / "plan.json").mkdir()
    assert plan.main([CONFIG, f"--workdir={tmp_path}"]) == 2
    assert "plan.json cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("source", ["model", "config"])
def test_plan_imports_nothing_heavy(tmp_path, source):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA3_8B))
    flag = f"--model={path}" if source == "model" else CONFIG
    code = (
        "import sys; from qkvjax.commands import plan;"
        f"assert plan.main(['plan', {flag!r}]) == 0;"
        "heavy = {'jax', 'flax', 'tensorflow', 'matplotlib'} | "
        f"({{'ml_collections', 'numpy'}} if {source == 'model'} else set());"
        "loaded = heavy & set(sys.modules); assert not loaded, loaded"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Q-K=V" in done.stdout


@pytest.mark.parametrize(
    "text, value",
    [
        ("80GB", 80 * 10**9),
        ("141GiB", 141 * 2**30),
        ("1.5 TiB", 3 * 2**39),
        ("512b", 512),
        ("2kB", 2000),
    ],
)
def test_sizes(text, value):
    assert roofline.parse_bytes(text, "--memory") == value


def test_bandwidths():
    assert roofline.parse_bytes("3.35TB/s", "--bandwidth", per_second=True) == 3_350 * 10**9
    assert roofline.parse_bytes("900GiB", "--bandwidth", per_second=True) == 900 * 2**30


LAYERS = st.lists(
    st.tuples(st.integers(1, 50), st.none() | st.integers(1, 30)), min_size=1, max_size=5
)


@given(cache=LAYERS, free=st.integers(0, 5000))
def test_longest_context_fits_and_one_more_does_not(cache, free):
    longest = roofline.longest_context(cache, free)
    if longest is None:
        assert roofline.sequence_bytes(cache, 10**6) <= free
    else:
        assert roofline.sequence_bytes(cache, longest) <= free
        assert roofline.sequence_bytes(cache, longest + 1) > free


@given(cache=LAYERS, length=st.integers(1, 60), free=st.integers(-100, 5000))
def test_most_sequences_fit_and_one_more_does_not(cache, length, free):
    users = roofline.most_sequences(cache, length, free)
    size = roofline.sequence_bytes(cache, length)
    assert users * size <= max(free, 0) < (users + 1) * size


def test_speed_grows_with_the_batch_to_what_the_caches_allow():
    speeds = [roofline.decode_tokens_per_second(1e12, 1e10, 1e6, b) for b in (1, 10, 10**9)]
    assert speeds[0] == pytest.approx(1e12 / (1e10 + 1e6))
    assert speeds[0] < speeds[1] < speeds[2] < 1e6
    assert math.isclose(speeds[2], 1e6, rel_tol=1e-3)
