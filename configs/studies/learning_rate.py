"""Is a verdict an artefact of one learning rate?

  qkvjax study --config=configs/studies/learning_rate.py --workdir=runs/learning_rate

The quickstart's model (435,968 parameters with three projections) and data. Each variant is trained
with five learning rates on three seeds, and compared at its own best one on five others. The
schedule ends at 0, so that one field alone varies. QKV, Q-K=V, GQA-2, Q=K-V and Q=K=V: 75 runs that
tune and 25 that are compared, about 25 s of a CPU core each, an hour in all with the start of each.
"""

import runpy
from pathlib import Path

from qkvjax import config as base
from qkvjax import sweep

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def get_config(arg=None):
    given = base.parse_arg(arg, seeds=5)
    quickstart = Path(__file__).parents[1] / "quickstart.py"
    config = runpy.run_path(str(quickstart))["get_config"]()
    config.evals["eval"]["max_labels"] = 100_000
    config.optimizer.final_learning_rate = 0.0
    config.study.update(
        title="Is a verdict an artefact of one learning rate?",
        tuned=sweep.tuned("optimizer.learning_rate", RATES, seeds=(100, 101, 102)),
        seeds=given.seeds,
    )
    return config
