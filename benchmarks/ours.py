"""Parts that the benchmarks share: qkvjax's model and train step, options, records."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import shlex
import sys
from pathlib import Path

from sizes import SIZES, Size

from qkvjax import config as configs
from qkvjax.parallel import host


def config_of(size: Size, sharing: str, dtype: str):
    """Returns a config of the model that `torch_model` has too.

    LayerNorm, GELU, learned positions, no biases, no query-key norm.
    """
    config = configs.default()
    config.model.update(
        d_model=size.width,
        num_layers=size.layers,
        num_heads=size.heads,
        sharing=sharing,
        position="learned",
        norm="layernorm",
        mlp="gelu",
        mlp_ratio=4.0,
        qk_norm=False,
    )
    config.data.update(seq_len=size.length, batch_size=size.batch)
    config.train.compute_dtype = dtype
    return config


def spec_of(size: Size, sharing: str, implementation: str = "auto"):
    """Returns the spec of that model."""
    from qkvjax.models.spec import model_spec

    model = configs.resolve(config_of(size, sharing, "float32")).model
    return model_spec(model, size.vocab, size.length, implementation=implementation)


def train_call(size: Size, sharing: str, dtype: str, implementation: str = "auto"):
    """Compiles a train step on one device; its batch is of random ids.

    Args:
      size: of the model and its batch.
      sharing: such as "q-k=v".
      dtype: of the computation.
      implementation: of attention.

    Returns:
      (call, peak bytes): `call()` starts one step and returns its loss; the peak is the compiler's.
    """
    import jax
    import numpy as np

    from qkvjax.costs.measure import peak_bytes
    from qkvjax.parallel.host_batch import place
    from qkvjax.parallel.mesh import make_mesh
    from qkvjax.training.step import init_state, make_optimizer, make_train_step, on_leaves

    config = config_of(size, sharing, dtype)
    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        optimizer, rate = make_optimizer(config, 1000, 20)
        key = jax.random.key(0)
        spec = spec_of(size, sharing, implementation)
        state = jax.jit(lambda: init_state(spec, optimizer, key, config))()
        ids = np.random.default_rng(0).integers(0, size.vocab, (1, size.batch, size.length + 1))
        shape = (1, size.batch, size.length)
        batch = {
            "inputs": ids[..., :-1].astype(np.int32),
            "targets": ids[..., 1:].astype(np.int32),
            "positions": np.broadcast_to(np.arange(size.length, dtype=np.int32), shape),
            "segment_ids": np.ones(shape, np.int32),
            "weights": np.ones(shape, np.float32),
        }
        batch = place(batch, mesh)
        leaves, tree = jax.tree.flatten(state)
        step = on_leaves(make_train_step(config, optimizer, rate), tree)
        compiled = jax.jit(step, donate_argnums=0).lower(leaves, batch).compile()

    def call():
        nonlocal leaves
        leaves, metrics = compiled(leaves, batch)
        return metrics["loss"]

    return call, peak_bytes(compiled)


def arguments(doc: str, **defaults) -> argparse.Namespace:
    """Parses the command line of a benchmark.

    Args:
      doc: help text of the script.
      defaults: option -> default value, which fixes the type; a list is written with commas.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", help="a JSONL file that the records are added to")
    for name, value in defaults.items():
        kind = _split if isinstance(value, list) else type(value)
        parser.add_argument(f"--{name}", type=kind, default=value)
    options = parser.parse_args()
    if getattr(options, "size", "tiny") not in SIZES:
        print(f"error: --size={options.size} is not one of {', '.join(SIZES)}", file=sys.stderr)
        sys.exit(2)
    return options


def _split(text: str) -> list[str]:
    return text.split(",")


def record(file: str | None, /, **values) -> None:
    """Prints a record; adds it to a JSONL file with date, device, versions and command.

    Args:
      file: path of the JSONL file; None or "" writes none.
      values: the record.
    """
    environment = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": host.device_name(),
        "jax": importlib.metadata.version("jax"),
        "python": sys.version.split()[0],
        "git": host.revision(),
        "command": shlex.join(["python", *sys.argv]),
    }
    print(json.dumps(values))
    if file:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as lines:
            lines.write(json.dumps(environment | values) + "\n")
