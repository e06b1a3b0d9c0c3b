import json

import pytest
import simulated_study as simulated

from qkvjax.analysis import claims, records
from qkvjax.analysis.claim import CANT_TELL, CONTRADICTED, NOT_MEASURED, SUPPORTED, about
from qkvjax.analysis.sharings import masked_bits, paper_bits
from qkvjax.analysis.summary import summarize


def verdicts(workdir):
    return {c.id: f.verdict for c, f in claims.findings(summarize(records.read(workdir)))}


def study_of(tmp_path, facts, seeds=8, params=300_000_000, tokens=10**10, **change):
    """A study of label -> (overrides, relative loss, cache bytes)."""
    labels = {label: overrides for label, (overrides, *_) in facts.items()}
    lines = []
    for label, (overrides, loss, cache) in facts.items():
        for seed in range(seeds):
            line = simulated.result(label, overrides, seed, loss, noise=0.001)
            line["costs"] |= {"num_params": params, "cache_bytes_per_token": cache}
            lines.append(line | {"tokens": tokens} | change)
    study = simulated.study(labels, next(iter(labels)), list(range(seeds)))
    return simulated.write(tmp_path, study, lines)


TIED = {"QKV": ({}, 0.0, 4096), "Q-K=V": ({"model.sharing": "q-k=v"}, 0.013, 2048)}


def test_a_small_study_decides_nothing_but_arithmetic(tmp_path):
    found = verdicts(simulated.sharing_study(tmp_path, 12))
    assert found["P1"] == SUPPORTED
    for claim in ("A1", "A2", "A3", "A7", "A8", "P1b", "P3", "F1"):
        assert found[claim] == CANT_TELL, claim
    for claim in ("A4", "A10", "P2", "P4", "P7", "F2"):
        assert found[claim] == NOT_MEASURED, claim


def test_every_listed_claim_is_there_once():
    ids = [one.id for one in claims.CLAIMS]
    expected = [f"A{i}" for i in range(1, 19)] + [f"P{i}" for i in range(1, 9)] + ["F1", "F2"]
    assert [i for i in ids if i != "P1b"] == expected


def test_a_study_of_the_right_size_decides(tmp_path):
    # 1.3 % of 2 bits a byte is 1.8 % perplexity with a byte tokenizer: below the claimed 2.2 %.
    found = verdicts(study_of(tmp_path, TIED))
    assert found["F1"] == CONTRADICTED and found["A1"] == CONTRADICTED
    assert found["P1b"] == CANT_TELL  # the paper scored padding, this study did not
    padded = verdicts(study_of(tmp_path / "padded", TIED, score_pads=True))
    assert padded["F1"] == CANT_TELL and padded["P1b"] == CONTRADICTED


def test_memory_of_another_model_decides_nothing(tmp_path):
    """A2: what `bench memory` compiled counts for the study of that model alone."""
    workdir = study_of(tmp_path, TIED)
    for params, verdict in ((300_000_000, SUPPORTED), (99, NOT_MEASURED)):
        lines = [{"what": "memory", "mode": "train", "sharing": sharing, "batch": 1, "context": 16,
                  "base_batch": 1, "base_context": 16, "peak_bytes": peak, "num_params": params}
                 for sharing, peak in (("q-k-v", 100), ("q-k=v", 85))]  # fmt: skip
        (workdir / "bench.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert verdicts(workdir)["A2"] == verdict


def test_vision_is_decided_by_images_alone(tmp_path):
    """P5: not by sets of them with an odd one out."""
    for source, verdict in (
        ("npz:mnist.npz", CONTRADICTED),
        ("anomaly:npz:mnist.npz", NOT_MEASURED),
    ):
        workdir = simulated.accuracy_study(tmp_path / verdict)
        text = (workdir / "results.jsonl").read_text()
        for task in ("sort", "copy"):
            text = text.replace(f'"synthetic:{task}"', f'"{source}"')
        (workdir / "results.jsonl").write_text(text)
        assert verdicts(workdir)["P5"] == verdict


def test_too_few_tokens_or_one_seed_decide_nothing(tmp_path):
    assert verdicts(study_of(tmp_path / "a", TIED, tokens=10**8))["F1"] == CANT_TELL
    assert verdicts(study_of(tmp_path / "b", TIED, seeds=1))["F1"] == CANT_TELL


def test_head_sharing_is_checked_against_its_formula(tmp_path):
    facts = TIED | {
        "Q-GQA-2": ({"model.sharing": "q-k=v", "model.num_kv_heads": 2}, 0.02, 512),
        "Q-MQA": ({"model.sharing": "q-k=v", "model.num_kv_heads": 1}, 0.03, 256),
    }
    assert verdicts(study_of(tmp_path, facts, params=10**6))["P2"] == SUPPORTED
    facts["Q-MQA"] = (*facts["Q-MQA"][:2], 300)
    assert verdicts(study_of(tmp_path / "wrong", facts, params=10**6))["P2"] == CONTRADICTED


def test_a_study_of_something_else_measures_no_claim(tmp_path):
    facts = {"slow": ({}, 0.0, 4096), "fast": ({"optimizer.learning_rate": 0.01}, 0.02, 4096)}
    assert set(verdicts(study_of(tmp_path, facts)).values()) == {NOT_MEASURED}


@pytest.mark.parametrize(
    "low,high,verdict",
    [(0.01, 0.04, SUPPORTED), (0.04, 0.06, CONTRADICTED), (-0.01, 0.04, CANT_TELL),
     (-0.02, 0.01, CONTRADICTED), (None, None, CANT_TELL)],
)  # fmt: skip
def test_about(low, high, verdict):
    assert about(0.03, low, high, no_effect=0.0) == verdict


def test_the_reference_marks():
    assert paper_bits("q-k=v") == pytest.approx(0.0187, abs=1e-4)
    assert masked_bits() == pytest.approx(0.0072, abs=1e-4)


def test_a_tie_regularises_only_by_its_best_dropout(tmp_path):
    """A8: each sharing with its best dropout against QKV with its own."""
    labels, results = {}, []
    for sharing, losses in {"q-k-v": (0.05, 0.03), "q-k=v": (0.04, 0.0)}.items():
        for dropout, loss in zip((0.0, 0.1), losses):
            label = f"{simulated.name(sharing)} dropout={dropout}"
            labels[label] = {"model.sharing": sharing, "model.dropout": dropout}
            results += [simulated.result(label, labels[label], s, loss) for s in range(5)]
    study = simulated.study(labels, "QKV dropout=0.0", list(range(5)))
    workdir = simulated.write(tmp_path, study, results)
    found = {c.id: f for c, f in claims.findings(summarize(records.read(workdir)))}["A8"]
    assert "against QKV dropout=0.1" in found.measured
    assert "Q-K=V dropout=0.1 −" in found.measured and "dropout=0.0" not in found.measured
    assert found.verdict == SUPPORTED  # of little data, whatever the size


def test_feed_forwards_that_share_and_experts(tmp_path):
    """A14: what a tie costs among experts minus what it costs without; A18: QKV alone."""
    losses = {("q-k-v", "swiglu"): 0.0, ("q-k=v", "swiglu"): 0.02,
              ("q-k-v", "swiglu(experts=4)"): -0.02, ("q-k=v", "swiglu(experts=4)"): 0.03,
              ("q-k-v", "swiglu(up=down)"): 0.001}  # fmt: skip
    labels, results = {}, []
    for (sharing, mlp), loss in losses.items():
        label = f"{simulated.name(sharing)} {mlp}"
        labels[label] = {"model.sharing": sharing, "model.mlp": mlp}
        results += [simulated.result(label, labels[label], s, loss, noise=1e-4) for s in range(5)]
    study = simulated.study(labels, "QKV swiglu", list(range(5)))
    workdir = simulated.write(tmp_path, study, results)
    found = {c.id: f for c, f in claims.findings(summarize(records.read(workdir)))}
    assert found["A14"].measured.startswith("gap among experts, minus the gap without:\nQ-K=V")
    assert "+3" in found["A14"].measured and found["A14"].verdict == CANT_TELL  # its size
    assert found["A18"].measured.startswith("against feed-forwards of their own:\nQKV swiglu(up")
    assert "experts" not in found["A18"].measured
