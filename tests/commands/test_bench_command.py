"""`bench`: programs compiled for every sharing, and times of attention."""

import pytest

from qkvjax.costs import memory


@pytest.fixture(scope="module")
def measured(run_command, recipe, folders):
    """Returns (result of the command, workdir)."""
    workdir = folders / "memory"
    flags = (f"--config={recipe}", "--batches=1,8", "--contexts=16", f"--workdir={workdir}")
    return run_command("bench", "memory", *flags), workdir


def test_every_sharing_at_every_shape(measured, lines):
    result, workdir = measured
    assert result.code == 0, result.err
    records = lines(workdir / "bench.jsonl")
    programs = {(r["mode"], r["sharing"], r["batch"], r["context"]) for r in records}
    assert len(programs) == len(records) == 2 * 5 * 3  # modes, sharings, batches 1, 4 (base), 8
    assert "decoding" in result.out and "Q=K=V" in result.out
    assert "<svg" in (workdir / "memory.svg").read_text()


def test_peaks_are_those_of_the_programs(measured, lines):
    """Decoding keeps weights and cache; K = V saves one of the cache's two tensors."""
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


def test_records_identify_the_model_by_its_size(measured, lines):
    """A study shows only what was compiled for its model."""
    sizes = {r["num_params"] for r in lines(measured[1] / "bench.jsonl")}
    assert len(sizes) == 1 and sizes.pop() > 1_000


def test_sharings_that_the_heads_forbid_are_reported(run_command, recipe, tmp_path):
    result = run_command(
        "bench",
        "memory",
        f"--config={recipe}",
        "--config.model.num_kv_heads=1",
        "--batches=4",
        "--contexts=16",
        f"--workdir={tmp_path}",
    )
    assert result.code == 0, result.err
    assert result.out.count("is left out: sharing") == 3 and "compiled Q-K=V" in result.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "what should be measured? Write qkvjax bench memory"),
        (("speed",), "not bench speed"),
        (("memory", "--batches=0"), "--batches=0: write whole numbers"),
        (("memory", "--contexts=many"), "write whole numbers from 1 on"),
        (("memory",), "--workdir=DIR is missing"),
        (("decode", "--workdir=W", "--contexts=7"), "give 8 tokens or more"),
        (("decode", "--workdir=W", "--contexts=2000000000"), "more than is free here"),
        (
            (
                "memory",
                "--workdir=W",
                "--config.model.kind=encoder",
                "--config.model.tie_embeddings=False",
            ),
            "bench memory needs a language model",
        ),
    ],
)
def test_bad_input(run_command, recipe, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    result = run_command("bench", *flags[:1], f"--config={recipe}", *flags[1:])
    assert result.code == 2 and message in result.err and result.err.count("error:") == 1


@pytest.fixture(scope="module")
def timed(run_command, recipe, folders):
    """Returns (result by measure, file of records) of both measures of speed, after memory."""
    workdir = folders / "speed"
    results = {}
    for what in ("memory", "decode", "kernels", "decode"):
        flags = (f"--config={recipe}", "--batches=4", "--contexts=16", f"--workdir={workdir}")
        results[what] = run_command("bench", what, *flags)
    return results, workdir / "bench.jsonl"


def test_decoding_of_every_sharing(timed, lines):
    results, file = timed
    assert results["decode"].code == 0, results["decode"].err
    records = [r for r in lines(file) if r["what"] == "decode"]
    sizes = {r["sharing"]: r["cache_bytes"] for r in records}
    assert len(records) == 7  # five sharings, two of them with the output rotated back as well
    assert sizes["q-k=v"] == sizes["q=k=v"] == sizes["q-k-v"] / 2 == sizes["q=k-v"] / 2
    assert records[0]["ratio"][0] == 1 and all(r["impl"] == "xla" for r in records)
    for r in records:
        assert r["gigabytes_per_second"] == pytest.approx(r["cache_bytes"] / r["seconds"] / 1e9)
    output = results["decode"].out
    assert "Q-K=V unrotated_output" in output and "GB/s" in output


def test_the_op_with_two_tensors_and_with_one(timed, lines):
    results, file = timed
    assert results["kernels"].code == 0, results["kernels"].err
    records = [r for r in lines(file) if r["what"] == "kernels"]
    timed_passes = {(r["sharing"], r["pass"]) for r in records}
    assert timed_passes == {
        (s, p) for s in ("q-k-v", "q-k=v") for p in ("forward", "with backward")
    }
    assert "Q-K=V, with backward" in results["kernels"].out


def test_measures_keep_each_other(timed, lines):
    """Measured again, a figure replaces the one before; the others stay."""
    whats = [r["what"] for r in lines(timed[1])]
    assert set(whats) == {"memory", "decode", "kernels"} and whats.count("decode") == 7
