"""The quickstart study: what is the best use of these bytes of cache?

  qkvjax study --config=configs/quickstart.py --workdir=runs/quickstart

Five variants x three seeds of a small byte-level model on the interpreter's own library, in the
modern recipe (2 layers, width 128, 4 heads of 32, RoPE, query-key norm, RMSNorm, SwiGLU; 435,968
parameters with three projections). Q-K=V caches one tensor where QKV caches two; GQA-2, with half
the key-value heads, has the same cache without a tie. Q=K-V and Q=K=V tie queries too. About five
minutes on two CPU cores, installation included; expected 2.61 bits per byte for QKV, 2.72 for
Q-K=V and 2.61 for GQA-2 (the library of Python 3.11, seed 0). Small on purpose: it fits into
minutes, and the report says what that is too small to tell. A larger study is the same file with
other values:

  --config=configs/quickstart.py:seeds=8,depth=4,steps=5000
"""

import ml_collections

from qkvjax import config as base
from qkvjax.sweep import axis, chain, equal_cache


def get_config(arg=None):
    given = base.parse_arg(arg, seeds=3, depth=2, steps=360)
    config = base.default()
    config.model.update(num_layers=given.depth, d_model=128, num_heads=4)
    config.data.update(source="stdlib", seq_len=128, batch_size=8)
    config.optimizer.update(learning_rate=4e-3, final_learning_rate=4e-4, warmup_steps="5%")
    config.train.update(
        steps=given.steps,
        log_every="12.5%",
        eval_every="12.5%",
        checkpoint_every="100%",
        keep_checkpoints=1,
    )
    config.evals = {
        "eval": {"kind": "bits_per_byte", "split": "validation", "max_labels": 20_000},
        "eval_train": {"kind": "bits_per_byte", "split": "train", "max_labels": 8_000},
        "inside": {"kind": "inside"},
    }
    config.study = ml_collections.ConfigDict(
        {
            "title": "What is the best use of these bytes of cache?",
            "points": _points(config.model.num_heads),
            "seeds": given.seeds,
            "prompt": "def main(",
        }
    )
    return config


def _points(num_heads):
    """Sharings, and behind Q-K=V its control with the same cache."""
    tied = axis("model.sharing", ("q-k=v",))
    return chain(
        axis("model.sharing", ("q-k-v",)),
        tied,
        equal_cache(tied, num_heads=num_heads),
        axis("model.sharing", ("q=k-v", "q=k=v")),
    )
