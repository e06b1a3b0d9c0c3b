"""What a model costs, before anything is trained; no accelerator, no weights, no waiting.

  qkvjax plan --model=config.json                    a Hugging Face file, or its folder
  qkvjax plan --model=config.json --memory=141GiB --bandwidth=4.8TB/s --context=32768
  qkvjax plan --config=configs/lm.py:size=124m,sharing=q-k=v --workdir=runs/plan
  qkvjax plan --config=configs/lm.py:size=124m --topology=v5e-16 --all_sharings

--model reads a published config.json (docs/reference/plan.md lists the families) and prints what
each sharing of its projections would save: cache, parameters, context, users, and a roofline
estimate of decoding speed. In a file of an unknown family with the keys of Llama every figure is
marked as an estimate; encoders, hybrids and whatever else plan cannot count are refused.

--config gives the exact costs of one of our recipes, and of every other sharing that its
heads allow. With --workdir, plan.json holds the same numbers.

--topology compiles the recipe's real train step for hardware that is not there (v4, v5e, v5p and
v6e slices with the extra qkvjax[tpu], h200-N with qkvjax[cuda], cpu:N here): memory of a device,
whether it fits, how each parameter is sharded, what is sent between devices.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from qkvjax import files
from qkvjax.commands import cli
from qkvjax.costs import roofline, sharings
from qkvjax.errors import UserError

DEVICE = "one H100 SXM"
MEMORY, BANDWIDTH = "80GB", "3.35TB/s"
FOR_MODEL = ("memory", "bandwidth", "context", "weight_dtype", "cache_dtype")


FLAGS = {
    "model": (str, None, "a Hugging Face config.json, or the folder that holds it"),
    "memory": (str, MEMORY, f"bytes for weights and cache, as 80GB or 141GiB; of {DEVICE}"),
    "bandwidth": (str, BANDWIDTH, f"bytes that memory delivers a second; of {DEVICE}"),
    "weight_dtype": (
        str,
        "bfloat16",
        "of the weights: bfloat16, float16, float32 or int8; unset,"
        " a quantised file is counted at its own width",
    ),
    "cache_dtype": (str, "bfloat16", "of the cache: bfloat16, float16, float32 or int8"),
    "topology": (
        str,
        None,
        "compile for hardware that is not here: v5e-16, v6e-256, h200-8, cpu:8",
    ),
    "workdir": (str, None, "where plan.json goes; made when absent"),
    "context": (
        int,
        None,
        "tokens of each user; unset means the model's maximum, at most 131072",
        1,
        10**12,
    ),
    "all_sharings": (bool, False, "with --topology: a row a sharing"),
    "batches": (list, [], "with --topology: a row for each micro-batch"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    words = list(sys.argv if argv is None else argv)
    words = words if words and words[0].startswith("-") else words[1:]
    command = shlex.join(["qkvjax", "plan", *words])
    return cli.run(argv, __doc__, FLAGS, lambda values: plan(values, command), config="optional")


def plan(values: flags.FlagValues, command: str) -> None:
    """Prints the costs and, with --workdir, writes plan.json."""
    if values.model is not None and "config" in values:
        raise UserError("give --model or --config, not both: they plan different models")
    if values.model is not None and values.topology is not None:
        raise UserError("--topology compiles one of our recipes: give it with --config")
    if values.model is None and "config" not in values:
        raise UserError(
            "give --model=config.json (a Hugging Face file) or --config=configs/lm.py (a recipe)"
        )
    if values.model is None:
        allowed = ("memory",) if values.topology else ()
        if given := [n for n in FOR_MODEL if values[n].present and n not in allowed]:
            raise UserError(f"--{given[0]} goes with --model: leave it out beside --config")
        lines, record = plan_topology(values) if values.topology else plan_recipe(values)
    else:
        lines, record = plan_model(values)
    if values.workdir is not None:
        path = Path(values.workdir) / "plan.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, {"command": command, **record})
        lines += ["", f"written: {path}"]
    print("\n".join(lines))
    if record.get("fits") is False:
        from qkvjax.costs import compiled

        raise UserError(compiled.too_large(record))


def plan_recipe(values: flags.FlagValues) -> tuple[list[str], dict]:
    """The same for --config."""
    if given := [name for name in ("all_sharings", "batches") if values[name].present]:
        raise UserError(f"--{given[0]} goes with --topology: give both or none")
    from qkvjax.config import resolve

    return sharings.recipe_costs(resolve(values.config))


def plan_topology(values: flags.FlagValues) -> tuple[list[str], dict]:
    """The same for --config with --topology."""
    from qkvjax.config import resolve
    from qkvjax.costs import compiled

    try:
        batches = [int(word) for word in values.batches]
    except ValueError:
        batches = [0]
    if any(batch < 1 for batch in batches):
        raise UserError(f"--batches={','.join(values.batches)}: give whole numbers, as 1,4,16")
    given = values["memory"].present
    memory = roofline.parse_bytes(values.memory, "--memory") if given else None
    config = resolve(values.config)
    before, exact = sharings.recipe_costs(config)
    more = {"memory": memory, "all_sharings": values.all_sharings, "batches": batches}
    lines, record = compiled.plan(config, values.topology, **more)
    return [*before, "", *lines], exact | record


def plan_model(values: flags.FlagValues) -> tuple[list[str], dict]:
    """The lines to print for --model and the record for plan.json."""
    from qkvjax.costs import model_costs

    given = {name: values[name].present for name in FOR_MODEL}
    return model_costs.plan(values, given, DEVICE)
