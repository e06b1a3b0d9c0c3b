"""Feed-forwards that share too, and mixtures of experts: does tying K and V combine with them?

  qkvjax study --config=configs/feedforward.py --workdir=runs/feedforward
  qkvjax study --config=configs/feedforward.py --workdir=runs/feedforward --list

The quickstart's model (2 layers, width 128, bytes), QKV and Q-K=V, each with four feed-forwards:
SwiGLU as usual; its maps up and down one matrix; one feed-forward for both layers; four experts of
which each token meets one. Three seeds: 24 runs of 300 steps, a minute to two each on a CPU core.
On a CPU the experts' products cost as much as if every token met all of them.
"""

import runpy
from pathlib import Path

from qkvjax import config as base
from qkvjax import sweep

FEED_FORWARDS = ("swiglu", "swiglu(up=down)", "swiglu(layers=2)", "swiglu(experts=4,top=1)")


def get_config(arg=None):
    given = base.parse_arg(arg, seeds=3)
    config = runpy.run_path(str(Path(__file__).parent / "quickstart.py"))["get_config"]()
    config.study.update(
        title="Does sharing K and V combine with feed-forwards that share, and with experts?",
        points=sweep.product(
            sweep.axis("model.sharing", ("q-k-v", "q-k=v")),
            sweep.axis("model.mlp", FEED_FORWARDS),
        ),
        seeds=given.seeds,
    )
    return config
