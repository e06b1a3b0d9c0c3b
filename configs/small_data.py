"""Little data, many epochs, dropout tuned for each sharing: does a tie regularise?

  qkvjax study --config=configs/small_data.py --workdir=runs/small_data
  qkvjax study --config=configs/small_data.py:package=email,epochs=10 --workdir=runs/email

The quickstart's model (2 layers, width 128, bytes; 435,968 parameters with three projections) on
one package of the standard library (json: about 45 KB, so that 30 epochs are some 1,200 steps), its
last tenth held out. Each of the five sharings is trained with dropout 0, 0.3, 0.5 and 0.7 on seeds
0, 1 and 2, and compared at its own best dropout on seeds 3 to 7. (QKV ends at 4.98, 2.91, 2.87 and
3.40 bits per byte, seed 0: the best lies inside.) There are 60 tuning runs and 25 compared runs,
about two minutes each on a CPU core, three hours in all. The same held-out text chooses the dropout
and scores the comparison; this is so for every sharing.
"""

import runpy
import sysconfig
from pathlib import Path

from qkvjax import config as base
from qkvjax import sweep
from qkvjax.attention.spec import SHARINGS
from qkvjax.errors import UserError

TUNING_SEEDS = (0, 1, 2)


def get_config(arg=None):
    given = base.parse_arg(arg, package="json", epochs=30, seeds=5)
    folder = Path(sysconfig.get_paths()["stdlib"]) / given.package
    if not folder.is_dir():
        raise UserError(f"package={given.package!r} is none of the standard library: try json")
    config = runpy.run_path(str(Path(__file__).parent / "quickstart.py"))["get_config"]()
    config.data.source = f"text:{folder}/**/*.py"
    config.train.steps = f"{given.epochs}ep"
    config.seed = len(TUNING_SEEDS)
    config.study.update(
        title=f"Does a tie regularise? ({given.package}, {given.epochs} epochs)",
        points=sweep.axis("model.sharing", SHARINGS),
        tuned=sweep.tuned("model.dropout", (0.0, 0.3, 0.5, 0.7), seeds=TUNING_SEEDS),
        seeds=given.seeds,
        prompt="import ",
    )
    return config
