"""Bring in models that were trained elsewhere, and tie the projections of trained ones.

  qkvjax convert import --source=SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/smollm2
  qkvjax convert tie --workdir=runs/smollm2 --output=runs/smollm2-tied --sharing=q-k=v

import: a GGUF file of Llama's architecture (needs pip install qkvjax[gguf]). The workdir gets
config.json, tokenizer.json, a checkpoint in float32 and origin.json, which says where it came from;
generate, analyze and evaluate --data=... take it like a trained run.

tie: roles that the sharing joins get the mean of their projections (--method=average). Nothing is
trained, so a model that was not made for it loses most of what it knows.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from qkvjax.commands import cli
from qkvjax.errors import UserError, among
from qkvjax.parallel import host

TASKS = ("import", "tie")
# Windows that an imported model is scored in, unless it was made for shorter ones.
MOST_TOKENS = 1024


FLAGS = {
    "source": (str, None, "import: a .gguf file"),
    "workdir": (str, None, "import: where the model is put; tie: the trained run"),
    "output": (str, None, "tie: where the tied model is put"),
    "sharing": (str, None, "tie: what it shares, such as q-k=v"),
    "method": (str, "average", "tie: average"),
}


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv if argv is None else argv)
    task = given.pop(1) if len(given) > 1 and not given[1].startswith("-") else None
    return cli.run(given, __doc__, FLAGS, lambda values: body(values, task))


def body(values: flags.FlagValues, task: str | None) -> None:
    if task not in TASKS:
        raise UserError(
            "what should be converted? Write qkvjax convert import --source=FILE --workdir=DIR, or"
            " qkvjax convert tie --workdir=DIR --output=DIR --sharing=q-k=v"
            + (f", not convert {task}" if task else "")
        )
    {"import": import_, "tie": tie}[task](values)


def import_(values: flags.FlagValues) -> None:
    """`convert import`: a file's model becomes a workdir."""
    if not values.source:
        raise UserError("--source=FILE is missing: which .gguf file should be read?")
    from qkvjax import config as configs
    from qkvjax.interop import gguf
    from qkvjax.training.restore import new_workdir, save_model

    workdir = new_workdir(values.workdir)
    found = gguf.read(values.source)
    tokenizer = workdir.absolute() / "tokenizer.json"
    gguf.write_tokenizer(found.tokenizer, tokenizer)
    config = configs.default()
    config.model.update(found.fields)
    seq_len = min(found.context, MOST_TOKENS)
    config.data.update(tokenizer=f"bpe:{tokenizer}", seq_len=seq_len, batch_size=1)
    source = Path(values.source)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    origin = {"source": source.name, "sha256": digest, "quantization": found.quantization}
    arrays = {f"model.{name}": array for name, array in found.arrays.items()}
    spec = save_model(workdir, configs.resolve(config), arrays, origin | {"date": host.now()})
    print(
        f"{workdir}: {spec.num_params:,} parameters of {source.name} ({found.quantization},"
        f" widened to float32); the cache takes {spec.cache_bytes_per_token('bfloat16'):,} bytes a"
        " token in bfloat16"
    )


def tie(values: flags.FlagValues) -> None:
    """`convert tie`: a copy of a run whose projections are shared."""
    from qkvjax import config as configs
    from qkvjax.attention.spec import canonical_sharing, parse_sharing, sharing_name
    from qkvjax.interop.tie import METHODS, tied_arrays
    from qkvjax.training.restore import abstract_model, load_arrays, new_workdir, save_model

    if not values.workdir or not values.output or not values.sharing:
        raise UserError("tie needs --workdir=DIR, --output=DIR and --sharing=..., such as q-k=v")
    if values.method not in METHODS:
        use = among(values.method, METHODS)
        raise UserError(f"--method={values.method!r} is unknown: use {use}")
    values.sharing = canonical_sharing(values.sharing)
    parse_sharing(values.sharing)
    arrays, config, step = load_arrays(values.workdir)
    if any("sharing" in layer for layer in config.model.layer_overrides):
        raise UserError(
            f"{values.workdir} has layers of different sharings (model.layer_overrides): tie needs"
            " one sharing for all layers"
        )
    old = config.model.sharing
    config = configs.changed(config, model={"sharing": values.sharing})
    names = list(abstract_model(config)[1])
    tied = tied_arrays(arrays, names, old, values.sharing)
    output = new_workdir(values.output)
    origin = {
        "source": str(Path(values.workdir).absolute()),
        "step": step,
        "sharing": str(old),
        "method": values.method,
        "date": host.now(),
    }
    spec = save_model(output, config, tied, origin)
    print(
        f"{output}: {sharing_name(old)} became {sharing_name(values.sharing)} by {values.method},"
        f" {spec.num_params:,} parameters; nothing was trained"
    )
