"""A model of 7 billion parameters, scored and sampled on 8 devices: peak bytes of each.

The programs are compiled for 8 virtual devices and not run. XLA's CPU widens the operands of
bfloat16 products to float32, so the bounds below count bytes of float32.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import jax
import pytest

from qkvjax import config as configs
from qkvjax.commands import cli
from qkvjax.costs.measure import peak_bytes
from qkvjax.evaluation.evaluators import compile_scoring
from qkvjax.generation.serving import abstract, compile_generation
from qkvjax.parallel.mesh import for_generation, for_scoring
from qkvjax.training.run import planned_spec

ROOT = Path(__file__).parents[2]
DEVICES = 8
# Parameters are gathered layer by layer, as by the compilers of accelerators.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def peaks():
    """program -> peak bytes of a device; and the bytes of all parameters in float32."""
    recipe = runpy.run_path(cli.find_config("configs/lm.py"))["get_config"]
    config = recipe("size=7b,sharing=q-k=v")
    config = configs.resolve(config)
    spec = planned_spec(config)
    dtype = "bfloat16"
    scoring = for_scoring(spec)
    generation = for_generation(spec)
    model = abstract(spec, scoring, dtype, dtype)
    programs = compile_generation(spec, generation, 8, 2048, dtype=dtype, param_dtype=dtype)
    programs["score"] = compile_scoring(config, model, scoring)
    results = {name: peak_bytes(program) for name, program in programs.items()}
    return results | {"parameters": 4 * spec.num_params, "devices": jax.device_count()}


def main():
    print("result: " + json.dumps(peaks()))


@pytest.mark.slow
def test_seven_billion_parameters_are_scored_and_sampled_on_eight_devices(tmp_path):
    sys.path.insert(0, str(ROOT / "tests/parallel"))
    import processes

    sys.path.insert(0, str(Path(__file__).parent))
    flags = os.environ.get("XLA_FLAGS", ""), IN_ORDER
    program = f"import {__name__} as t; t.main()"
    results = processes.run_program(tmp_path, program, XLA_FLAGS=" ".join(flags))
    print(results)
    assert results["devices"] == DEVICES
    whole = results["parameters"]
    for program in ("prefill", "decode", "score"):
        assert results[program] < whole / 4, program
