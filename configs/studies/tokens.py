"""Does the cost of a tie shrink with the number of tokens?

  qkvjax study --config=configs/studies/tokens.py --workdir=runs/tokens

The quickstart's model and data, trained on 1, 3, 10, 30 and 100 tokens for each of QKV's 435,968
parameters: the same tokens for all variants, each budget from its start with a schedule of its own.
A step has 32 sequences of 128 tokens, and 8 where 32 would leave fewer than 300 steps (1 token a
parameter). The library of Python 3.11 has 9.7 million tokens to train on, so 100 tokens a parameter
are four and a half epochs. QKV, Q-K=V and GQA-2 x three seeds: 45 runs, by the quickstart's 18,000
tokens a second of a CPU core 25 s, 75 s, 4, 12 and 40 minutes each, nine hours in all.

  --config=configs/studies/tokens.py:largest=10      an hour and a quarter: budgets up to 10
"""

import runpy
from pathlib import Path

from qkvjax import config as base
from qkvjax import sweep

NUM_PARAMS = 435_968
BUDGETS = (1, 3, 10, 30, 100)  # tokens a parameter
FEWEST_STEPS = 300


def get_config(arg=None):
    given = base.parse_arg(arg, seeds=3, largest=max(BUDGETS))
    quickstart = Path(__file__).parents[1] / "quickstart.py"
    config = runpy.run_path(str(quickstart))["get_config"]()
    config.evals["eval"]["max_labels"] = 100_000
    tied = sweep.axis("model.sharing", ("q-k=v",))
    config.study.update(
        title="Does the cost of a tie shrink with the number of tokens?",
        points=sweep.chain(
            sweep.axis("model.sharing", ("q-k-v",)),
            tied,
            sweep.equal_cache(tied, num_heads=config.model.num_heads),
        ),
        settings=tuple(
            _setting(budget, config.data.seq_len)
            for budget in BUDGETS
            if budget <= max(given.largest, min(BUDGETS))
        ),
        seeds=given.seeds,
    )
    return config


def _setting(budget, seq_len):
    tokens = budget * NUM_PARAMS
    enough = tokens // (32 * seq_len) >= FEWEST_STEPS
    return {
        "label": f"{budget} token{'s' * (budget > 1)} a parameter",
        "train.steps": f"{tokens} tokens",
        "data.batch_size": 32 if enough else 8,
    }
