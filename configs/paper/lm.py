"""The paper's language models side by side: eight variants at 300M, six at 1.2B.

  qkvjax study --config=configs/paper/lm.py:size=300m --workdir=runs/300m \\
      --config.data.source=tokens:data
  qkvjax study --config=configs/paper/lm.py:size=300m,pads=1 ...       padding scored, as there

Kayyam et al. 2026, section 4.3: the recipe of configs/lm.py:recipe=paper, 10B tokens (4,238 steps
of 2.36M at 300m, 8,475 of 1.18M at 1.2b), one seed. The paper put one document into each window of
2,048 tokens, padded it and scored the padding: `pads=1` does that, and the report says so in red;
without it documents are packed and padding never counts. The paper's validation perplexities stand
in the report beside ours; only those with pads=1 measure the same thing. Made for eight A100; not
run on hardware yet.
"""

import runpy
from pathlib import Path

import ml_collections

from qkvjax import config as base
from qkvjax.errors import UserError, did_you_mean

# label: sharing, key-value heads (None: all), the paper's validation perplexity
VARIANTS = {
    "300m": {
        "QKV": ("q-k-v", None, 5.11),
        "Q-K=V": ("q-k=v", None, 5.27),
        "Q=K-V": ("q=k-v", None, 5.36),
        "Q=K=V": ("q=k=v", None, 6.41),
        "GQA-4": ("q-k-v", 4, 5.15),
        "MQA": ("q-k-v", 1, 5.19),
        "Q-GQA-4": ("q-k=v", 4, 5.32),
        "Q-MQA": ("q-k=v", 1, 5.36),
    },
    "1.2b": {
        "QKV": ("q-k-v", None, 5.004),
        "Q-K=V": ("q-k=v", None, 5.128),
        "GQA-8": ("q-k-v", 8, 5.030),
        "MQA": ("q-k-v", 1, 5.057),
        "Q-GQA-8": ("q-k=v", 8, 5.158),
        "Q-MQA": ("q-k=v", 1, 5.212),
    },
}
STEPS = {"300m": 4_238, "1.2b": 8_475}


def get_config(arg=None):
    given = base.parse_arg(arg, size="300m", pads=0, seeds=1)
    if given.size not in VARIANTS:
        near = did_you_mean(given.size, VARIANTS)
        raise UserError(f"size={given.size!r} is none of {', '.join(VARIANTS)}{near}")
    recipe = runpy.run_path(str(Path(__file__).parents[1] / "lm.py"))["get_config"]
    config = recipe(f"size={given.size},recipe=paper")
    config.data.score_pads = bool(given.pads)
    config.train.steps = STEPS[given.size]
    config.train.accumulation = 24 if given.size == "300m" else 36
    variants = VARIANTS[given.size]
    config.study = ml_collections.ConfigDict(
        {
            "title": f"The paper's language models of {given.size}",
            "points": tuple(
                {"label": label, "model.sharing": sharing, "model.num_kv_heads": heads}
                for label, (sharing, heads, _) in variants.items()
            ),
            "seeds": given.seeds,
            "prompt": "The",
            "reference": {
                "source": "arXiv 2606.04032: validation perplexity, padding scored, one run each",
                "metric": "perplexity",
                "score_pads": True,
                "values": {"all": {label: [value] for label, (_, _, value) in variants.items()}},
            },
        }
    )
    return config
