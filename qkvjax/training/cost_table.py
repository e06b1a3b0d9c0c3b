"""The cost table that a run starts with."""

from __future__ import annotations

import jax

from qkvjax.attention.spec import sharing_name
from qkvjax.parallel import host, xla_flags
from qkvjax.progress import duration
from qkvjax.training.implementation import settle_attention


def cost_table(run) -> str:
    """What the run is and what it costs, a line each."""
    config, spec, seq_len = run.config, run.spec, run.config.data.seq_len
    sharings = list(dict.fromkeys(layer.sharing for layer in spec.layers))
    first = spec.layers[0]
    steps, per_step = run.durations.steps, run.tokens_per_step
    flops = run.train_flops_per_token
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.abstract))
    shape = "x".join(str(n) for n in run.mesh.shape.values())
    rows = [
        ("sharing", ", ".join(sharing_name(sharing) for sharing in sharings)),
        (
            "model",
            f"{spec.num_layers} layers, width {spec.d_model}, {first.num_heads} query heads,"
            f" {first.num_kv_heads} key-value heads of {first.head_dim}",
        ),
        ("parameters", f"{spec.num_params:,}"),
        ("forward MACs a sequence", f"{spec.forward_macs(seq_len):,} at {seq_len} tokens"),
        ("training FLOPs a token", f"{flops:.4g}"),
        (
            "cache bytes a token",
            f"{spec.cache_bytes_per_token('bfloat16'):,} in bfloat16,"
            f" {spec.cache_bytes_per_token('float32'):,} in float32",
        ),
        ("state", f"{state / 2**20:,.1f} MiB of parameters and what the optimizer keeps"),
        (
            "run",
            f"{steps:,} steps of {per_step:,} tokens: {steps * per_step:,} tokens,"
            f" {steps * per_step * flops:.3g} FLOPs",
        ),
        ("attention", settle_attention(run)),
        ("device", f"{host.device_name()}; mesh {shape} ({', '.join(run.mesh.shape)})"),
        ("precision", f"{config.train.compute_dtype}, matrices {config.train.param_dtype}"),
    ]
    if flags := xla_flags.in_force():
        rows.append(("XLA flags", f"{flags} ({xla_flags.SWITCH}=off leaves out qkvjax's)"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def goodput(summary: dict, wall: float, compiled: float, before: float) -> str:
    """Which part of the time since the start was training, and what the rest went to.

    Args:
      summary: of `loop.fit`.
      wall: seconds since the start.
      compiled: of these, seconds of compiling.
      before: training seconds of earlier parts of the run, which the summary's contain.
    """
    trained, evaluated = summary["seconds"] - before, summary["evaluation_seconds"]
    rest = max(0.0, wall - trained - compiled - evaluated)
    return (
        f"goodput {100 * trained / wall:.1f} %: {duration(trained)} of training in"
        f" {duration(wall)}; compiling took {compiled:.1f} s, evaluation {evaluated:.1f} s, data,"
        f" saving and the rest {rest:.1f} s; no save held up training for more than"
        f" {1000 * summary['longest_save']:.0f} ms"
    )
