"""What should V be where it shares the projection of a rotated role?

  qkvjax study --config=configs/studies/rotary_values.py --workdir=runs/rotary_values

The quickstart's model (435,968 parameters with three projections) and data. Q-K=V and Q=V-K with V
as the raw state (before the query-key norm and the rotation), as the rotated one, and as the
rotated one with the output rotated back; each with query-key norm and without. QKV has a V of its
own, so the values do not differ there: it has the two points of the norm. In the other two "raw"
is the only one whose V lacks the query-key norm, so that no two points are the same model. Fourteen
variants x five seeds: 70 runs of about 25 s of a CPU core, 45 minutes in all with the start of
each.
"""

import runpy
from pathlib import Path

from qkvjax import config as base
from qkvjax.attention.spec import ROTARY_VALUES, sharing_name

NORMS = {"": True, ", no qk-norm": False}


def get_config(arg=None):
    given = base.parse_arg(arg, seeds=5)
    quickstart = Path(__file__).parents[1] / "quickstart.py"
    config = runpy.run_path(str(quickstart))["get_config"]()
    config.evals["eval"]["max_labels"] = 100_000
    config.study.update(
        title="What should V be where it shares a rotated role?",
        points=(*_untied(), *_tied()),
        seeds=given.seeds,
    )
    return config


def _untied():
    return tuple(
        {"label": f"QKV{words}", "model.sharing": "q-k-v", "model.qk_norm": norm}
        for words, norm in NORMS.items()
    )


def _tied():
    return tuple(
        {
            "label": f"{sharing_name(sharing)} {values.replace('_', ' ')}{words}",
            "model.sharing": sharing,
            "model.rotary_values": values,
            "model.qk_norm": norm,
        }
        for sharing in ("q-k=v", "q=v-k")
        for words, norm in NORMS.items()
        for values in ROTARY_VALUES
    )
