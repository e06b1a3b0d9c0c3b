"""What is the best use of a byte of cache, and of a parameter?

  qkvjax study --config=configs/studies/equal_cache.py --workdir=runs/equal_cache

The quickstart's model (2 layers, width 128, 4 heads; 435,968 parameters with three projections) and
data. Each size of the cache has a variant with a tie and one without: half of QKV's is Q-K=V and
GQA-2, a quarter "Q-K=V GQA-2" and MQA. Behind each comes the same with a feed-forward that spends
the parameters and multiply-adds that it saves ("wider"; within 0.5 % of QKV's). Nine variants x
eight seeds: 72 runs of about 25 s of a CPU core, 45 minutes in all with the start of each.
"""

import runpy
from pathlib import Path

from qkvjax import config as base
from qkvjax import sweep


def get_config(arg=None):
    given = base.parse_arg(arg, seeds=8)
    quickstart = Path(__file__).parents[1] / "quickstart.py"
    config = runpy.run_path(str(quickstart))["get_config"]()
    config.evals["eval"]["max_labels"] = 100_000
    config.study.update(
        title="What is the best use of a byte of cache?",
        points=_points(config.model),
        seeds=given.seeds,
    )
    return config


def _points(model):
    half = {"model.sharing": "q-k=v"}
    quarter = {"label": "Q-K=V GQA-2", "model.sharing": "q-k=v", "model.num_kv_heads": 2}
    untied = sweep.axis("model.sharing", ("q-k-v",))
    controls = sweep.equal_cache((half, quarter), num_heads=model.num_heads)
    smaller = (half, *controls, quarter)
    wider = sweep.equal_params(smaller, model, baseline=untied[0])
    return sweep.chain(untied, smaller, wider)
