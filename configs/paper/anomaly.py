"""The paper's set anomaly study: which of ten images is of another class?

  qkvjax study --config=configs/paper/anomaly.py:source=digits --workdir=runs/anomaly

Kayyam et al. 2026, section 4.2, as the authors' later code settles it: 10,000 sets to train on, an
encoder without positions, a score for each image and a softmax over the ten; Adam 1e-3, constant,
20 epochs of 128 sets. The paper's vectors are features of a ResNet34 on CIFAR-100; here they are
the pixels of `source` (digits, npz:PATH, idx:FOLDER or tfds:NAME), so figures do not compare.
"""

import ml_collections

from qkvjax import config as base
from qkvjax import sweep


def get_config(arg=None):
    given = base.parse_arg(arg, source="digits", width=64, layers=2, heads=2, epochs=20, seeds=3)
    config = base.default()
    config.model.update(
        kind="encoder",
        d_model=given.width,
        num_layers=given.layers,
        num_heads=given.heads,
        position="none",
        norm="layernorm",
        mlp="gelu",
        mlp_ratio=4.0,
        qk_norm=False,
        use_bias=True,
        tie_embeddings=False,
        init="uniform",
    )
    config.data.update(source=f"anomaly:{given.source}", seq_len=10, batch_size=128)
    config.optimizer.update(
        learning_rate=1e-3,
        final_learning_rate=1e-3,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        b1=0.9,
        b2=0.999,
        clip_norm=5.0,
    )
    config.train.update(
        steps=f"{given.epochs}ep",
        log_every="10%",
        eval_every="10%",
        checkpoint_every="100%",
        keep_checkpoints=1,
    )
    config.evals = {
        "eval": {"kind": "accuracy", "split": "validation"},
        "eval_train": {"kind": "accuracy", "split": "train", "max_labels": 2_000},
    }
    config.study = ml_collections.ConfigDict(
        {
            "title": f"Which image is the odd one? ({given.source}, pixels)",
            "points": sweep.paper_variants(10),
            "seeds": given.seeds,
        }
    )
    return config
