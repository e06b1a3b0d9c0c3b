"""`evaluate` and `qkvjax.load`: one score, however it is computed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkvjax


def scored(run_command, workdir, *flags):
    result = run_command("evaluate", f"--workdir={workdir}", *flags)
    assert result.code == 0, result.err
    return result


def test_lines_and_batch_sizes(run_command, tied, copy, lines):
    workdir = copy(tied)
    for size in (1, 3, 16):
        scored(run_command, workdir, f"--batch_size={size}")
    result = scored(run_command, workdir)
    records = lines(workdir / "evaluation.jsonl")
    assert [r["metric"] for r in records] == ["bits_per_byte", "perplexity"] * 4
    for record in records:
        assert record["task"] == "bits_per_byte" and record["step"] == 20
        assert record["num_items"] == records[0]["num_items"] == record["num_bytes"]
    bits = [r["value"] for r in records if r["metric"] == "bits_per_byte"]
    np.testing.assert_allclose(bits, bits[0], rtol=1e-6)
    assert f"bits_per_byte {bits[-1]:.6f}" in result.out
    # What training wrote in its last line.
    last = lines(workdir / "metrics.jsonl")[-1]
    np.testing.assert_allclose(bits, last["eval/bits_per_byte"], rtol=1e-6)
    np.testing.assert_allclose(records[1]["value"], last["eval/perplexity"], rtol=1e-6)


def test_another_corpus_is_scored_as_a_whole(run_command, tied, copy, lines, corpus, tmp_path):
    """Bits per byte of every document, straight from the model: each token once."""
    workdir, book = copy(tied), tmp_path / "book"
    book.mkdir()
    texts = [b"the cat", b"sat on the mat and then the dog ran home, number 7.", b"a" * 33]
    for i, text in enumerate(texts):
        (book / f"{i}.txt").write_bytes(text)
    scored(run_command, workdir, f"--data=text:{book}", "--batch_size=2")
    record = lines(workdir / "evaluation.jsonl")[0]
    assert record["num_items"] == sum(map(len, texts)) and record["data"] == f"text:{book}"
    assert record["pad_fraction"] == 0

    model, tokenizer, config = qkvjax.load(workdir)
    width, rows, wanted = config.data.seq_len, [], []
    for text in texts:
        stream = np.array([tokenizer.separator, *text], np.int32)
        for start in range(0, len(text), width):
            window = stream[start : start + width + 1]
            rows.append(np.pad(window[:-1], (0, width + 1 - len(window))))  # nothing sees the pads
            wanted.append(window[1:])
    x, _ = model.hidden(jnp.asarray(np.stack(rows)))
    log_p = jax.nn.log_softmax(model.logits(x))
    nats = -sum(float(log_p[i, np.arange(len(ids)), ids].sum()) for i, ids in enumerate(wanted))
    np.testing.assert_allclose(
        record["value"], nats / math.log(2) / sum(map(len, texts)), rtol=1e-5
    )
    # The run's own corpus, whole: all of it, not its validation tenth.
    scored(run_command, workdir, f"--data=text:{corpus}")
    size = sum(file.stat().st_size for file in corpus.iterdir())
    assert lines(workdir / "evaluation.jsonl")[2]["num_items"] == size


def test_an_earlier_step(run_command, tied, copy, lines):
    workdir = copy(tied)
    scored(run_command, workdir, "--step=10")
    record = lines(workdir / "evaluation.jsonl")[0]
    curve = {r["step"]: r.get("eval/bits_per_byte") for r in lines(workdir / "metrics.jsonl")}
    assert record["step"] == 10
    assert record["value"] == pytest.approx(curve[10], rel=1e-6) != pytest.approx(curve[20])


def test_damage_falls_back_and_the_line_says_which_step(run_command, tied, copy, damage, lines):
    workdir = copy(tied)
    damage(workdir / "checkpoints" / "20")
    result = scored(run_command, workdir)
    assert "checkpoint 20 is damaged and passed over" in result.out
    assert lines(workdir / "evaluation.jsonl")[0]["step"] == 10
    result = run_command("evaluate", f"--workdir={workdir}", "--step=20")
    assert result.code == 45 and result.err.count("error:") == 1
    damage(workdir / "checkpoints" / "10")
    assert run_command("evaluate", f"--workdir={workdir}").code == 45


def test_verify_reads_every_checkpoint_and_writes_nothing(
    run_command, tied, copy, damage, checksums
):
    workdir = copy(tied)
    before = checksums(workdir)
    result = run_command("evaluate", f"--workdir={workdir}", "--verify")
    assert (
        result.code == 0 and "step 10: intact, " in result.out and "step 20: intact, " in result.out
    )
    assert checksums(workdir) == before
    damage(workdir / "checkpoints" / "20")
    result = run_command("evaluate", f"--workdir={workdir}", "--verify")
    assert (
        result.code == 45 and "step 10: intact" in result.out and "step 20: damaged: " in result.out
    )
    assert "1 of 2 checkpoints" in result.err and "pass them over" in result.err
    assert run_command("evaluate", f"--workdir={workdir}", "--verify", "--step=10").code == 0
    for flags, message in (("--step=7", "has no step 7"), ("--tasks=accuracy", "scores nothing")):
        result = run_command("evaluate", f"--workdir={workdir}", "--verify", flags)
        assert result.code == 2 and message in result.err


def test_the_next_line_survives_a_torn_one(run_command, tied, copy, lines):
    workdir = copy(tied)
    (workdir / "evaluation.jsonl").write_text('{"task": "a"}\n{"task": "bits_per_b')
    scored(run_command, workdir)
    records = lines(workdir / "evaluation.jsonl")
    assert [r["task"] for r in records] == ["a", "bits_per_byte", "bits_per_byte"]


def test_load_works_without_a_mesh(tied):
    model, tokenizer, config = qkvjax.load(tied)
    ids = jnp.asarray(tokenizer.encode(b"the cat sat"))[None]
    assert jax.sharding.get_abstract_mesh().empty
    logits = model(ids)
    assert logits.shape == (1, 11, 257) and np.isfinite(logits).all()
    np.testing.assert_allclose(jax.jit(model.__call__)(ids), logits, atol=1e-5)
    assert config.model.sharing == "q-k=v"
    earlier, _, _ = qkvjax.load(tied, step=10)
    assert np.abs(earlier(ids) - logits).max() > 1e-3
