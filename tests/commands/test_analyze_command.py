"""`analyze`: a run looked into as a user does it."""

import numpy as np


def test_two_runs(run_command, tied, untied, copy, lines):
    places = [copy(tied, "tied"), copy(untied, "untied")]
    flags = [f"--workdir={place}" for place in places]
    result = run_command("analyze", *flags, "--num_sequences=3")
    assert result.code == 0, result.err
    assert "Q-K=V, 48 tokens" in result.out and "QKV, 48 tokens" in result.out
    for place, names in zip(places, ({"W_q", "W_kv"}, {"W_q", "W_k", "W_v"})):
        records = lines(place / "analysis.jsonl")
        assert names <= {r["what"] for r in records}
        spectrum = next(r for r in records if r["metric"] == "singular_values")
        assert np.all(np.diff(spectrum["values"]) <= 0) and spectrum["num_tokens"] == 48
        assert {p.name for p in (place / "analysis").iterdir()} == {
            "spectra.svg",
            "heads.svg",
            "attention.svg",
        }


def test_projections_named_by_nothing_are_all(run_command, tied, copy, lines):
    place = copy(tied, "all")
    assert (
        run_command("analyze", f"--workdir={place}", "--projections=", "--num_sequences=1").code
        == 0
    )
    assert {"W_q", "W_kv"} <= {r["what"] for r in lines(place / "analysis.jsonl")}


def test_bad_input(run_command, tied, tmp_path):
    result = run_command("analyze", f"--workdir={tied}", "--projections=k")
    assert result.code == 2
    assert "no projection 'k' in sharing 'q-k=v': use one of q, kv" in result.err
    short = tmp_path / "short.txt"
    short.write_text("brief")
    result = run_command("analyze", f"--workdir={tied}", f"--data=text:{short}")
    assert result.code == 2 and "no validation document has data.seq_len = 16" in result.err
    assert run_command("analyze").code == 2
    assert not (tied / "analysis.jsonl").exists()
