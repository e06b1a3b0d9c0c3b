"""What does the paper's padding do to a comparison?

  qkvjax study --config=configs/studies/padding.py --workdir=runs/padding

The quickstart's model (435,968 parameters with three projections) on the interpreter's library, in
two settings. "padding not scored" is the usual one: training reads all text, packed into one
stream, and the score counts every byte once. "padding scored" is the paper's (data.score_pads):
each document is one sequence, cut after its first bytes or filled up with separators, and every
label counts, in training and in the score. Bits per byte divide by the bytes of the text in both
settings, so that padding, which is soon learned, adds little to them; perplexity is per label, and
padding lowers it (results.jsonl has both, and `pad_fraction`).

Sequences have 1,024 tokens, two a step. With the quickstart's 128 only 0.7 % of the labels of this
library are padding (of 577 documents half are longer than 10,000 bytes), and the settings would
differ in what is cut off alone; with 1,024 it is 5 %. No corpus that every machine has is as short
as the paper's documents in its windows. QKV, Q-K=V and GQA-2 x two settings x five seeds: 30 runs
of 360 steps, about three minutes of a CPU core each, an hour and a half in all.

  --config=configs/studies/padding.py:length=2048      11 % padding, twice the time
"""

import runpy
from pathlib import Path

from qkvjax import config as base
from qkvjax import sweep


def get_config(arg=None):
    given = base.parse_arg(arg, seeds=5, length=1024)
    quickstart = Path(__file__).parents[1] / "quickstart.py"
    config = runpy.run_path(str(quickstart))["get_config"]()
    config.evals["eval"]["max_labels"] = 100_000
    config.data.update(seq_len=given.length, batch_size=2)
    tied = sweep.axis("model.sharing", ("q-k=v",))
    config.study.update(
        title="What does the paper's padding do to a comparison?",
        points=sweep.chain(
            sweep.axis("model.sharing", ("q-k-v",)),
            tied,
            sweep.equal_cache(tied, num_heads=config.model.num_heads),
        ),
        settings=(
            {"label": "padding not scored", "data.score_pads": False},
            {"label": "padding scored", "data.score_pads": True},
        ),
        seeds=given.seeds,
    )
    return config
