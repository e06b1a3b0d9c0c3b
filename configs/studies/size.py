"""Does the cost of a tie shrink with the size of the model?

  qkvjax study --config=configs/studies/size.py --workdir=runs/size

The quickstart's model and data in four widths of heads of 32, two layers each, trained on 20 tokens
for each of QKV's parameters in steps of 32 sequences of 128. The learning rate falls as
width^-1/2, as in configs/lm.py, and ends at a tenth.

  setting  width  heads  parameters (QKV)  steps  learning rate
  0.1M     64     2      117,696           575    0.006
  0.4M     128    4      435,968           2,129  0.004243
  1.0M     192    6      954,944           4,663  0.003464
  1.7M     256    8      1,674,624         8,177  0.003

QKV, Q-K=V and "GQA half", half of the key-value heads of each size, x three seeds: 36 runs. By the
quickstart's speed (18,000 tokens a second of a CPU core at 0.4M) and the multiply-adds of the
others, 1, 8, 37 and 112 minutes each, 24 hours of a core in all.

  --config=configs/studies/size.py:largest=0.4M      half an hour: sizes up to 0.4M
"""

import runpy
from pathlib import Path

from qkvjax import config as base
from qkvjax import sweep
from qkvjax.errors import UserError, among

# label: (width, parameters of QKV)
SIZES = {
    "0.1M": (64, 117_696),
    "0.4M": (128, 435_968),
    "1.0M": (192, 954_944),
    "1.7M": (256, 1_674_624),
}
HEAD_DIM = 32
TOKENS_PER_PARAMETER = 20


def get_config(arg=None):
    given = base.parse_arg(arg, seeds=3, largest="1.7M")
    if given.largest not in SIZES:
        raise UserError(f"largest={given.largest!r} is none of {among(given.largest, SIZES)}")
    quickstart = Path(__file__).parents[1] / "quickstart.py"
    config = runpy.run_path(str(quickstart))["get_config"]()
    config.evals["eval"]["max_labels"] = 100_000
    config.data.batch_size = 32
    names = list(SIZES)[: list(SIZES).index(given.largest) + 1]
    half = sweep.by_setting({name: SIZES[name][0] // HEAD_DIM // 2 for name in names})
    config.study.update(
        title="Does the cost of a tie shrink with the size of the model?",
        points=sweep.chain(
            sweep.axis("model.sharing", ("q-k-v", "q-k=v")),
            ({"label": "GQA half", "model.num_kv_heads": half},),
        ),
        settings=tuple(_setting(name) for name in names),
        seeds=given.seeds,
    )
    return config


def _setting(name):
    width, num_params = SIZES[name]
    rate = round(3e-3 * (256 / width) ** 0.5, 6)
    return {
        "label": name,
        "model.d_model": width,
        "model.num_heads": width // HEAD_DIM,
        "optimizer.learning_rate": rate,
        "optimizer.final_learning_rate": round(rate / 10, 7),
        "train.steps": f"{TOKENS_PER_PARAMETER * num_params} tokens",
    }
