"""The paper's synthetic study: a bidirectional encoder on five tasks of digits, six variants.

  qkvjax study --config=configs/paper/synthetic.py:task=sort,width=64 --workdir=runs/sort
  qkvjax study --config=configs/paper/synthetic.py --workdir=runs/synthetic     the whole sweep

Kayyam et al. 2026, section 4.1, as the authors' later code settles it: one-hot digits, learned
positions from N(0, 1), pre-norm blocks with biases, exact GELU, torch's initial values, Adam with
a cosine over 158 steps of 128 sequences. Width 32, 64, 256 x layers 2, 4 x heads 2, 4 x task are
the settings; QKV, Q=K-V, Q-K=V, Q=K=V and the two with "+", score2d(10), the variants (Q=V-K is not
in the paper). A run of width 32 takes about 7 s of a CPU core, of 64 10 s, of 256, by its
arithmetic, 50 to 100 s: the whole sweep of 1,080 runs some ten hours of a core.
"""

import json
from pathlib import Path

import ml_collections

from qkvjax import config as base
from qkvjax import sweep
from qkvjax.errors import UserError, did_you_mean

TASKS = ("reverse", "sort", "swap", "sub", "copy")


def get_config(arg=None):
    given = base.parse_arg(arg, task=None, width=0, layers=0, heads=0, length=16, seeds=3)
    if given.task not in (None, *TASKS):
        near = did_you_mean(given.task, TASKS)
        raise UserError(f"task={given.task!r} is none of {', '.join(TASKS)}{near}")
    config = base.default()
    config.model.update(
        kind="encoder",
        d_model=64,
        num_layers=2,
        num_heads=2,
        position="learned",
        max_length=max(128, given.length),
        norm="layernorm",
        mlp="gelu",
        mlp_ratio=4.0,
        qk_norm=False,
        use_bias=True,
        tie_embeddings=False,
        init="uniform",
    )
    first = given.task or TASKS[0]  # the settings name each its own
    config.data.update(source=f"synthetic:{first}", seq_len=given.length, batch_size=128)
    config.optimizer.update(
        learning_rate=1e-3,
        final_learning_rate=0.0,
        schedule="cosine",
        warmup_steps=7,
        weight_decay=0.0,
        b1=0.9,
        b2=0.999,
        clip_norm=5.0,
    )
    config.train.update(
        steps=158, log_every="20%", eval_every="20%", checkpoint_every="100%", keep_checkpoints=1
    )
    config.evals = {"eval": {"kind": "accuracy", "split": "validation"}}
    config.study = ml_collections.ConfigDict(
        {
            "title": "Do encoders of short sequences need three projections?",
            "points": sweep.paper_variants(10),
            "settings": _settings(given),
            "seeds": given.seeds,
            "reference": _reference(given.length),
        }
    )
    return config


def _reference(length: int):
    """The authors' figures at a length that they ran, 16, 64 or 128; else None."""
    name = "synthetic.json" if length == 16 else f"synthetic_length{length}.json"
    path = Path(__file__).parent / name
    return json.loads(path.read_text()) if path.exists() else None


def _settings(given):
    """Width by width, the quickest first, so that a study cut short has whole widths."""

    def some(value, *all_):
        return (value,) if value else all_

    return tuple(
        {
            "label": f"{task} d{width} L{layers} H{heads}",
            "data.source": f"synthetic:{task}",
            "model.d_model": width,
            "model.num_layers": layers,
            "model.num_heads": heads,
        }
        for width in some(given.width, 32, 64, 256)
        for task in some(given.task, *TASKS)
        for layers in some(given.layers, 2, 4)
        for heads in some(given.heads, 2, 4)
    )
