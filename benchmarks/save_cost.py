"""Measures what saving a checkpoint costs a run of the quickstart's model.

  python benchmarks/save_cost.py

Stretches of 36 steps with a save at their beginning alternate with stretches without. A save stops
training while it copies the state (`held_seconds`). The copy is then written while training goes
on, which makes the steps slower on few cores. `all_seconds` is how much longer a stretch with a
save takes, until the save is written. The quickstart saves once in 360 steps.
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

STEPS = 36  # of a stretch
ROUNDS = 100  # pairs of stretches that count
WARM_UP = 2  # pairs of stretches before these
RECIPE = Path(__file__).parents[1] / "configs" / "quickstart.py"


def main() -> None:
    options = arguments(__doc__)
    host.keep_freed_memory()
    config = configs.from_dict(configs.to_dict(runpy.run_path(str(RECIPE))["get_config"]()))
    run = prepare_run(configs.resolve(config))
    plain = []  # seconds of each stretch without a save
    saving = []  # seconds of each stretch with one
    stopped = []  # seconds that a save stops training
    with jax.set_mesh(run.mesh), tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints")
        state = run.init()
        step = run.compile_step(state)
        batch = run.batch(0)
        checkpoints.prepare(state)
        leaves, tree = jax.tree.flatten(state)
        for i in range(2 * (WARM_UP + ROUNDS)):
            saves = i % 2 == 1
            began = time.perf_counter()
            if saves:
                checkpoints.save(i, jax.tree.unflatten(tree, leaves))
                stopped.append(time.perf_counter() - began)
            for _ in range(STEPS):
                leaves, metrics = step(leaves, batch)
            jax.block_until_ready(metrics)
            checkpoints.wait()
            stretches = saving if saves else plain
            stretches.append(time.perf_counter() - began)
        checkpoints.close()
    plain, saving, stopped = (np.array(times[WARM_UP:]) for times in (plain, saving, stopped))
    mean, low, high = interval(saving - plain)
    record(
        options.output,
        bench="save_cost",
        state_mib=sum(array.nbytes for array in leaves) / 2**20,
        step_seconds=float(np.median(plain)) / STEPS,
        held_seconds=float(np.median(stopped)),
        longest_held_seconds=float(stopped.max()),
        all_seconds=mean,
        all_seconds_interval=[low, high],
    )


if __name__ == "__main__":
    main()
