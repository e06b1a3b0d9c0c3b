"""Little data, many epochs, dropout tuned for each sharing: does a tie regularise?

  qkvjax study --config=configs/small_data.py --workdir=runs/small_data
  qkvjax study --config=configs/small_data.py:package=email,epochs=10 --workdir=runs/email

The quickstart's model (2 layers, width 128, bytes) on one package of the standard library (json:
about 45 KB, so that 30 epochs are some 1,200 steps), its last tenth held out. Five sharings x
dropout 0, 0.3, 0.5 and 0.7 x three seeds; each sharing is judged by its best dropout, which is
chosen by the same held-out text for all of them. (QKV ends at 4.98, 2.91, 2.87 and 3.40 bits per
byte, seed 0: the best lies inside.) Sixty runs, about two minutes each on a CPU core.
"""

import runpy
import sysconfig
from pathlib import Path

from qkvjax import config as base
from qkvjax import sweep
from qkvjax.attention.spec import SHARINGS
from qkvjax.errors import UserError


def get_config(arg=None):
    given = base.parse_arg(arg, package="json", epochs=30, seeds=3)
    folder = Path(sysconfig.get_paths()["stdlib"]) / given.package
    if not folder.is_dir():
        raise UserError(f"package={given.package!r} is none of the standard library: try json")
    config = runpy.run_path(str(Path(__file__).parent / "quickstart.py"))["get_config"]()
    config.data.source = f"text:{folder}/**/*.py"
    config.train.steps = f"{given.epochs}ep"
    config.study.update(
        title=f"Does a tie regularise? ({given.package}, {given.epochs} epochs)",
        points=sweep.product(
            sweep.axis("model.sharing", SHARINGS), sweep.axis("model.dropout", (0.0, 0.3, 0.5, 0.7))
        ),
        seeds=given.seeds,
        prompt="import ",
    )
    return config
