"""Whatever text or bytes come in: what is meant, or one UserError; never anything else."""

import contextlib
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qkvjax import config as configs
from qkvjax.attention.spec import parse_modifier, parse_sharing
from qkvjax.config import FIELDS
from qkvjax.data.open import open_dataset
from qkvjax.errors import UserError
from qkvjax.files import read_json, read_lines
from qkvjax.models.feedforward import parse_feed_forward
from qkvjax.training.metrics import Metrics

# Text that is near what is expected, and any other.
pieces = st.sampled_from(
    [
        *"qkv-=()+,.:0189 ",
        "swiglu",
        "experts",
        "top",
        "score2d",
        "uniform",
        "positions",
        "up=down",
        "inf",
        "nan",
        "-1",
        "1e400",
        "None",
    ]
)
near = st.lists(pieces, max_size=12).map("".join)
words = near | st.text(max_size=30)
scalars = words | st.integers() | st.floats() | st.booleans() | st.none()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
leave_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
refused = contextlib.suppress(UserError)


@given(words)
@example("q=k=v")
def test_sharings_modifiers_and_feed_forwards(text):
    for parse in (parse_sharing, parse_modifier, parse_feed_forward):
        with refused:
            parse(text)


@given(st.sampled_from(sorted(FIELDS)), values)
def test_a_field_takes_any_value_or_says_why_not(name, value):
    config = configs.default()
    with refused:
        configs.set_field(config, name, value)
        configs.identity(configs.resolve(config))


@leave_files
@given(st.dictionaries(st.sampled_from(["model", "data", "evals", "seed", "../x"]) | words, values))
def test_a_saved_configuration(tmp_path, found):
    (tmp_path / "config.json").write_text(json.dumps(found))
    with refused:
        configs.load(tmp_path / "config.json")


@leave_files
@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b'{"model": {"d_model": 1e999}}')
def test_files_of_any_bytes(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    for read in (configs.load, read_json, read_lines):
        with refused:
            read(path)


record = st.dictionaries(words, scalars, max_size=3).map(json.dumps)
torn = st.binary(max_size=30).map(lambda b: b.decode("latin-1").replace("\n", ""))


@leave_files
@given(st.lists(record | torn, max_size=5), st.booleans())
def test_metrics_of_any_lines_are_kept_mended_or_refused(tmp_path, lines, ends):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n" * ends, encoding="latin-1")
    with refused:
        metrics = Metrics(tmp_path, start=5)
        metrics.write(6, {"loss": float("nan")})
        metrics.close()
        found = read_lines(path, step=int)
        assert found[-1] == {"step": 6, "loss": None}
        assert all(line["step"] <= 6 for line in found)


@pytest.mark.parametrize(
    "source", ["text:{}", "jsonl:{}#text", "parquet:{}#text", "tokens:{}", "npz:{}", "idx:{}"]
)
def test_data_files_of_any_bytes(tmp_path, monkeypatch, source):
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path / "prepared"))

    @settings(max_examples=15)
    @given(st.binary(max_size=300) | st.sampled_from([b"PAR1", b"PK\x03\x04", b'{"text": 1}\n']))
    def check(content):
        path = tmp_path / ("train.bin" if "tokens" in source else "file")
        path.write_bytes(content)
        config = configs.default()
        config.data.update(source=source.format(path), seq_len=8)
        config.model.kind = "vit" if source.startswith(("npz", "idx")) else "lm"
        with refused:
            open_dataset(config, log=lambda line: None)

    check()
