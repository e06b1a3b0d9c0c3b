"""`bench memory`: programs compiled and not run, for every sharing."""

import pytest

from qkvjax.analysis import memory


@pytest.fixture(scope="module")
def measured(door, recipe, folders):
    """(what was told, the workdir)."""
    workdir = folders / "memory"
    flags = (f"--config={recipe}", "--batches=1,8", "--contexts=16", f"--workdir={workdir}")
    return door("bench", "memory", *flags), workdir


def test_every_sharing_at_every_place(measured, lines):
    told, workdir = measured
    assert told.code == 0, told.err
    records = lines(workdir / "bench.jsonl")
    places = {(r["mode"], r["sharing"], r["batch"], r["context"]) for r in records}
    assert len(places) == len(records) == 2 * 5 * 3  # modes, sharings, batches 1, 4 (base), 8
    assert "decoding" in told.out and "Q=K=V" in told.out
    assert "<svg" in (workdir / "memory.svg").read_text()


def test_peaks_are_those_of_the_programs(measured, lines):
    """Decoding holds weights and cache; K = V saves one of the cache's two tensors."""
    records = lines(measured[1] / "bench.jsonl")
    peak = {(r["mode"], r["sharing"], r["batch"]): r["peak_bytes"] for r in records}
    for mode in ("train", "decode"):
        assert peak[mode, "q-k-v", 1] < peak[mode, "q-k-v", 4] < peak[mode, "q-k-v", 8]
        assert peak[mode, "q=k=v", 8] < peak[mode, "q-k-v", 8]
    cache = 8 * 16 * 16 * 4  # batch, context, width, float32: of one tensor of one layer
    assert peak["decode", "q-k-v", 8] - peak["decode", "q-k=v", 8] >= cache
    saved = {s: part for s, b, _, part in memory.savings(records, "train") if b == 8}
    assert saved["q=k=v"] == pytest.approx(
        1 - peak["train", "q=k=v", 8] / peak["train", "q-k-v", 8]
    )


def test_sharings_that_the_heads_forbid_are_told(door, recipe, tmp_path):
    told = door(
        "bench", "memory", f"--config={recipe}", "--config.model.num_kv_heads=1", "--batches=4",
        "--contexts=16", f"--workdir={tmp_path}",
    )  # fmt: skip
    assert told.code == 0, told.err
    assert told.out.count("is left out: sharing") == 3 and "compiled Q-K=V" in told.out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "what should be measured? Write qkvjax bench memory"),
        (("speed",), "not bench speed"),
        (("memory", "--batches=0"), "--batches=0: write whole numbers"),
        (("memory", "--contexts=many"), "write whole numbers from 1 on"),
        (("memory",), "--workdir=DIR is missing"),
        (("memory", "--workdir=W", "--config.model.kind=encoder",
          "--config.model.tie_embeddings=False"), "memory is measured of kind lm"),
    ],
)  # fmt: skip
def test_bad_input(door, recipe, tmp_path, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    result = door("bench", *flags[:1], f"--config={recipe}", *flags[1:])
    assert result.code == 2 and told in result.err and result.err.count("error:") == 1
