"""What a save costs a run of the quickstart's model.

  python benchmarks/save_cost.py

Stretches of 36 steps, with a save at their beginning and without, take turns. A save holds up
training while it takes the state; then it is written beside the steps, which on few cores take
longer for it. `all_seconds` is what a stretch with a save takes more, writing to its end included.
The quickstart saves once in 360 steps.
"""

from __future__ import annotations

import runpy
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from ours import arguments, record

from qkvjax import config as configs
from qkvjax.parallel import host
from qkvjax.report.statistics import interval
from qkvjax.training.checkpoint import Checkpoints
from qkvjax.training.run import prepare_run

STEPS, ROUNDS = 36, 100
RECIPE = Path(__file__).parents[1] / "configs" / "quickstart.py"


def main() -> None:
    given = arguments(__doc__)
    host.keep_freed_memory()
    config = configs.from_dict(configs.to_dict(runpy.run_path(str(RECIPE))["get_config"]()))
    run = prepare_run(configs.resolve(config))
    plain, saving, held = [], [], []
    with jax.set_mesh(run.mesh), tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints")
        state = run.init()
        step, batch = run.compile_step(state), run.batch(0)
        checkpoints.prepare(state)
        leaves, tree = jax.tree.flatten(state)
        for i in range(2 * ROUNDS + 4):
            began = time.perf_counter()
            if i % 2:
                checkpoints.save(i, jax.tree.unflatten(tree, leaves))
                held.append(time.perf_counter() - began)
            for _ in range(STEPS):
                leaves, metrics = step(leaves, batch)
            jax.block_until_ready(metrics)
            checkpoints.wait()
            (saving if i % 2 else plain).append(time.perf_counter() - began)
        checkpoints.close()
    plain, saving, held = (np.array(seconds[2:]) for seconds in (plain, saving, held))
    mean, low, high = interval(saving - plain)
    record(
        given.output,
        bench="save_cost",
        state_mib=sum(x.nbytes for x in leaves) / 2**20,
        step_seconds=float(np.median(plain)) / STEPS,
        held_seconds=float(np.median(held)),
        longest_held_seconds=float(held.max()),
        all_seconds=mean,
        all_seconds_interval=[low, high],
    )


if __name__ == "__main__":
    main()
