"""A simulated study for tests: plausible numbers from a formula. Nothing was trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SHARINGS = ("q-k-v", "q-k=v", "q=k-v", "q=v-k", "q=k=v")
# Relative loss at the end, parameters, forward MACs, cache bytes a token, step and decode ratios.
_FACTS = {
    "q-k-v": (0.0, 3_412_224, 993_000_000, 4096, 1.0, 1.0),
    "q-k=v": (0.013, 3_150_080, 926_000_000, 2048, 0.962, 0.951),
    "q=k-v": (0.021, 3_150_080, 926_000_000, 4096, 0.958, 0.998),
    "q=v-k": (0.0015, 3_150_080, 926_000_000, 4096, 0.959, 1.003),
    "q=k=v": (0.058, 2_887_936, 859_000_000, 2048, 0.917, 0.949),
}


def name(sharing: str) -> str:
    """Returns the label of a sharing: "Q-K=V" for "q-k=v"."""
    return "QKV" if sharing == "q-k-v" else sharing.upper()


def result(
    label: str,
    overrides: dict,
    seed: int,
    loss: float = 0.0,
    facts=_FACTS["q-k-v"],
    noise: float = 0.004,
) -> dict:
    """Returns one line of results.jsonl; `loss` is the variant's relative loss at the end."""
    seed_noise = np.random.default_rng(seed).normal(0, 0.02)
    run_noise = np.random.default_rng([seed, sum(map(ord, label))]).normal(0, noise)
    curve = []
    for step in range(0, 1001, 100):
        gap = loss * (1 + 2.5 * np.exp(-step / 300)) * (step > 0)
        base = 1.93 + 6.07 * np.exp(-step / 90) + 0.55 * np.exp(-step / 420) + seed_noise
        score = base * (1 + gap) + run_noise * (step > 0)
        curve.append(
            {
                "step": step,
                "tokens": step * 4096,
                "seconds": 0.21 * step * facts[4],
                "bits_per_byte": float(score),
            }
        )
    score = curve[-1]["bits_per_byte"]
    return {
        "label": label,
        "overrides": overrides,
        "seed": seed,
        "identity": f"{label}-{seed}",
        "data_digest": "5f1d",
        "status": "done",
        "error": None,
        "workdir": f"runs/{label}-{seed}",
        "score": score,
        "metric": "bits_per_byte",
        "train_score": score - 0.06,
        "perplexity": float(2**score),
        "tokenizer": "bytes",
        "num_labels": 200_000,
        "num_bytes": 200_000,
        "pad_fraction": 0.0,
        "score_pads": False,
        "steps": 1000,
        "tokens": 4_096_000,
        "seconds": curve[-1]["seconds"],
        "curve": curve,
        "costs": {
            "num_params": facts[1],
            "forward_macs": facts[2],
            "seq_len": 256,
            "cache_bytes_per_token": facts[3],
        },
        "sample": {"prompt": "def main(", "text": f"self, x):\n    return x < {seed} & {label!r}"},
    }


def failed(label: str, overrides: dict, seed: int, error: str) -> dict:
    """Returns a line for a run that failed."""
    return {
        "label": label,
        "overrides": overrides,
        "seed": seed,
        "status": "failed",
        "error": error,
        "score": None,
        "curve": [],
    }


def study(labels: dict[str, dict], baseline: str, seeds: list[int]) -> dict:
    """Returns study.json; labels: label -> overrides."""
    return {
        "title": "Simulated study (made-up numbers for tests)",
        "baseline": baseline,
        "points": [{"label": label, "overrides": o} for label, o in labels.items()],
        "seeds": seeds,
        "config": {
            "seed": 0,
            "model": {
                "d_model": 256,
                "num_layers": 4,
                "num_heads": 8,
                "num_kv_heads": None,
                "sharing": "q-k-v",
                "layer_overrides": [],
            },
            "data": {"source": "stdlib", "seq_len": 256},
            "train": {"steps": 1000},
        },
        "command": "qkvjax study --config=configs/study.py --workdir=simulated",
        "environment": {
            "python": "3.11.9",
            "jax": "0.10.2",
            "device": "simulated cpu",
            "num_devices": 1,
            "cpu_count": 2,
            "platform": "linux",
            "date": "2026-01-01",
            "qkvjax": "0.1.0",
            "git": "0000000",
        },
        "data": {
            "source": "stdlib",
            "description": "simulated; no data was read",
            "digest": "5f1d",
            "num_documents": 1520,
            "num_train_tokens": 21_000_000,
            "num_validation_tokens": 2_300_000,
        },
    }


def measurements() -> dict:
    """Returns measurements.json."""
    rows = []
    for sharing, (_, params, _, _, step, decode) in _FACTS.items():
        rows.append(
            {
                "label": name(sharing),
                "step_seconds": 0.206 * step,
                "peak_bytes": 48 * params,
                "step_ratio": [step, step - 0.012 * (step < 1), step + 0.012 * (step < 1)],
                "decode_seconds": 0.0031 * decode,
                "decode_ratio": [
                    decode,
                    decode - 0.03 * (decode != 1),
                    decode + 0.03 * (decode != 1),
                ],
            }
        )
    return {
        "date": "2026-01-01",
        "device": "simulated cpu",
        "rounds": 20,
        "tokens_per_step": 4096,
        "decode": {"batch": 1, "length": 512, "cache_dtype": "bfloat16"},
        "rows": rows,
    }


def write(
    workdir: Path,
    study: dict,
    results: list[dict],
    measurements: dict | None = None,
    tail: str = "",
) -> Path:
    """Writes the files of a study; `tail` is appended to results.jsonl as it is."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "study.json").write_text(json.dumps(study))
    lines = "".join(json.dumps(line) + "\n" for line in results)
    (workdir / "results.jsonl").write_text(lines + tail)
    if measurements is not None:
        (workdir / "measurements.json").write_text(json.dumps(measurements))
    return workdir


def sharing_study(workdir: Path, num_seeds: int = 3, sharings=SHARINGS, fail=(), **kwargs) -> Path:
    """Writes a study of sharings; `fail` holds (sharing, seed) pairs that fail."""
    labels = {name(s): {"model.sharing": s} for s in sharings}
    results = []
    for s in sharings:
        overrides = labels[name(s)]
        for seed in range(num_seeds):
            if (s, seed) in fail:
                results.append(failed(name(s), overrides, seed, "the loss is <nan> at step 310"))
            else:
                line = result(name(s), overrides, seed, _FACTS[s][0], _FACTS[s])
                results.append(line | {k: v for k, v in kwargs.items() if k in line})
    measured = kwargs.get("measurements", measurements())
    body = study(labels, name(sharings[0]), list(range(num_seeds)))
    return write(workdir, body, results, measured, kwargs.get("tail", ""))


def accuracy_study(workdir: Path, settings=("sort d32", "sort d64", "copy d32"), **fields) -> Path:
    """Writes a study of accuracy in several settings: QKV, Q=K-V and the latter with "+"."""
    labels = {
        "QKV": {},
        "Q=K-V": {"model.sharing": "q=k-v"},
        "(Q=K-V)+": {"model.sharing": "q=k-v", "model.score": ["score2d(10)"]},
    }
    losses = {"QKV": 0.02, "Q=K-V": 0.10, "(Q=K-V)+": 0.03}
    results = []
    for setting in settings:
        task = (setting or "sort").split()[0]
        for seed in range(3):
            for label, overrides in labels.items():
                noise = np.random.default_rng([seed, len(label)]).uniform(0, 0.01)
                error = 0.0 if "copy" in setting else losses[label] + noise
                line = result(label, overrides, seed)
                for name in ("perplexity", "num_bytes", "pad_fraction", "sample"):
                    del line[name]
                curve = [
                    {"step": s, "tokens": 64 * s, "seconds": s, "error": error + 0.1 / (1 + s)}
                    for s in (0, 50, 100)
                ]
                results.append(
                    line
                    | {
                        "metric": "error",
                        "score": error,
                        "accuracy": 1 - error,
                        "solved": float(error <= 0.05),
                        "setting": setting,
                        "curve": curve,
                        "overrides": overrides | {"data.source": f"synthetic:{task}"},
                        "data_digest": task,
                        "train_score": None,
                    }
                )
    body = study(labels, "QKV", [0, 1, 2]) | {"settings": [s for s in settings if s]} | fields
    body["config"]["data"]["source"] = "synthetic:sort"
    return write(workdir, body, results)
