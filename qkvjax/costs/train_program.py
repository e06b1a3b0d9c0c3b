"""What the compiler says about one training step on given devices."""

from __future__ import annotations

import math
import re


def compile_train_step(config, devices) -> dict:
    """Compiles the training step of a config and returns what the compiler says about it.

    Returns:
      mesh, sharding (a dict for each parameter), bytes on each device, FLOPs of each device,
      collectives. Only mesh and peak_bytes_per_device where the step needs more memory than the
      compiler has: the peak is then what it asked for.

    Raises:
      UserError: the mesh does not divide the model or the batch.
    """
    import jax

    from qkvjax.costs.program import Program
    from qkvjax.parallel.mesh import make_mesh
    from qkvjax.training.checkpoint import named_arrays
    from qkvjax.training.fits import peak_bytes
    from qkvjax.training.run import check_mesh, compile_for, planned_spec

    spec = planned_spec(config)
    mesh = make_mesh(config.mesh.sizes, devices)
    micro_batch = config.data.batch_size // config.train.accumulation
    check_mesh(mesh, spec, config.data.seq_len, micro_batch)
    try:
        compiled, state = compile_for(config, spec, mesh)
    except jax.errors.JaxRuntimeError as error:
        return {"mesh": dict(mesh.shape), "peak_bytes_per_device": requested_bytes(error)}
    program = Program(compiled.as_text())
    cost = compiled.cost_analysis() or {}
    parameter_bytes = _tree_bytes(state.model)
    return {
        "mesh": dict(mesh.shape),
        "sharding": [
            {
                "name": name,
                "shape": list(array.shape),
                "spec": str(tuple(array.sharding.spec)),
                "bytes_per_device": _bytes_per_device(array),
            }
            for name, array in named_arrays(state.model).items()
        ],
        "num_params": spec.num_params,
        "cache_bytes_per_token": spec.cache_bytes_per_token("bfloat16"),
        "parameter_bytes_per_device": parameter_bytes,
        "gradient_bytes_per_device": parameter_bytes,
        "optimizer_bytes_per_device": _tree_bytes(state.optimizer),
        "temporary_bytes_per_device": compiled.memory_analysis().temp_size_in_bytes,
        "peak_bytes_per_device": peak_bytes(compiled),
        "matmul_flops_per_device": program.matmul_flops(),
        "analytic_flops_per_device": _analytic_flops(config, spec, mesh),
        "bytes_accessed_per_device": cost.get("bytes accessed"),
        "tokens_per_step": config.data.batch_size * config.data.seq_len,
        "collectives": program.collectives(),
    }


def requested_bytes(error: Exception) -> int:
    """Returns the bytes for which a compiler found no room; raises any other error again."""
    match = re.search(r"([\d.]+)([KMGT])\)? exceeds", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or match is None:
        raise error
    number, unit = match.groups()
    return int(float(number) * 1024 ** (1 + "KMGT".index(unit)))


def _tree_bytes(tree) -> int:
    """Returns the bytes on each device of all arrays in a tree."""
    import jax

    return sum(_bytes_per_device(leaf) for leaf in jax.tree.leaves(tree))


def _bytes_per_device(array) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _analytic_flops(config, spec, mesh) -> float:
    """Returns the FLOPs of each device for a step's matrix products, by the model's formula.

    Attention counts the pairs of those tiles that are computed. With train.remat the forward pass
    of the layers counts once more.
    """
    from qkvjax.kernels.xla import attention as xla

    length = config.data.seq_len
    macs = spec.forward_macs(length)
    for layer in spec.layers:
        skips = layer.causal and mesh.shape["context"] == 1
        tiles = xla.tiles_of(length, skips, layer.window)
        pairs = sum(
            (rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in tiles
        )
        macs += 2 * layer.num_heads * layer.head_dim * (pairs - layer.pairs(length))
    recomputed = 0
    if config.train.remat == "block":
        # All of a layer but its last product, whose result the backward pass does not need.
        last_products = spec.num_layers * spec.feed_forward.top * spec.d_ff
        outputs = spec.num_outputs + last_products
        recomputed = macs - length * spec.d_model * outputs
    return (6 * macs + 2 * recomputed) * config.data.batch_size / mesh.size
