"""Training, evaluation and generation compiled for hardware that is not here: do they fit, and what
does a train step send."""

from __future__ import annotations

import collections
import math
import os
import re

from qkvjax import config as configs
from qkvjax import formats
from qkvjax.attention.spec import SHARINGS, sharing_name
from qkvjax.costs.sharings import UNITS
from qkvjax.errors import UserError

# How messages call the programs of a record.
SAID_OF = {"train": "the train step", "evaluate": "the evaluation", "generate": "generation"}
ROWS = 12  # of the sharding table: the largest parameters; plan.json has all


def plan(config, name: str, *, memory=None, all_sharings=False, batches=()) -> tuple:
    """(lines, record) of a language model's programs on a topology.

    Args:
      config: what is trained; a mesh of one device takes all by mesh.fsdp=-1.
      name: of the topology.
      memory: bytes of a device; None means the chip's.
      all_sharings: a row a sharing as well.
      batches: a row for each of these micro-batches of the whole mesh as well.

    Raises:
      UserError: no such topology, no compiler for it, or a mesh that does not divide.
    """
    from qkvjax.parallel import topology

    where = topology.read(name)
    if config.model.kind != "lm":
        raise UserError("--topology compiles language models: choose a config with model.kind=lm")
    found = topology.devices(where)
    if all(size == 1 for size in config.mesh.sizes.values()) and where.count > 1:
        config = configs.changed(config, mesh={"fsdp": -1})
    if memory is None:
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = where.chip.memory if where.chip else here // where.count
    own = _compiled(config, found)
    record = {"topology": name, "devices": where.count, "device_kind": found[0].device_kind}
    record |= {"memory_bytes_per_device": memory, **own}
    record["programs"] = _programs(config, found, own)
    record["fits"] = all(program["fits"] for program in _judged(record).values())
    if "sharding" not in own:  # the compiler gave up
        return [], record
    record |= _largest(config, found, own, memory)
    record |= _roofline(own, where.chip)
    lines = _lines(config, record)
    if all_sharings:
        rows = record["sharings"] = [_sharing(config, found, s) for s in SHARINGS]
        lines += ["", *_sharing_table([row for row in rows if "sharding" in row])]
        lines += formats.notes([_why_not(row) for row in rows if "sharding" not in row])
    if batches:
        rows = record["batches"] = [_batch(config, found, n, memory) for n in batches]
        lines += ["", *_batch_table(rows)]
    return [*lines, "", *formats.notes(_notes(record, where.chip))], record


def _programs(config, devices, train: dict) -> dict[str, dict]:
    """Name of a program -> its `peak_bytes_per_device`, for all that a run of a config does.

    Args:
      train: of `_compiled`.
    """
    from qkvjax.evaluation.evaluators import compile_scoring
    from qkvjax.generation.serving import compile_generation
    from qkvjax.parallel.mesh import for_generation, make_mesh
    from qkvjax.training.run import abstract_state, planned_spec
    from qkvjax.training.step import make_optimizer

    spec = planned_spec(config)
    mesh = make_mesh(config.mesh.sizes, devices)
    optimizer_bytes = train.get("optimizer_bytes_per_device", 0)
    length = config.data.seq_len

    def evaluation():
        optimizer, _ = make_optimizer(config, 1000, 10)
        model = abstract_state(spec, optimizer, mesh, config).model
        return [compile_scoring(config, model, mesh)]

    def generation():
        where = for_generation(spec, devices) or make_mesh({}, devices[:1])
        dtype = config.train.compute_dtype
        programs = compile_generation(spec, where, batch=1, context=length, dtype=dtype)
        return list(programs.values())

    return {
        "train": {"peak_bytes_per_device": train["peak_bytes_per_device"]},
        # While a run is evaluated, what its optimizer keeps stays where it is.
        "evaluate": {"peak_bytes_per_device": _peak_of(evaluation) + optimizer_bytes},
        "generate": {"peak_bytes_per_device": _peak_of(generation)},
    }


def _peak_of(compile_programs) -> int:
    """The largest peak of compiled programs, or what the compiler asked for in vain."""
    import jax

    from qkvjax.training.fits import peak_bytes

    try:
        return max(peak_bytes(program) or 0 for program in compile_programs())
    except jax.errors.JaxRuntimeError as error:
        return _asked_for(error)


def _judged(record: dict) -> dict[str, dict]:
    """The programs of a record, each with whether it fits."""
    memory = record["memory_bytes_per_device"]
    for program in record["programs"].values():
        program["fits"] = program["peak_bytes_per_device"] <= memory
    return record["programs"]


def _compiled(config, devices) -> dict:
    """What the compiler says of a config's train step on these devices."""
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
        return {"mesh": dict(mesh.shape), "peak_bytes_per_device": _asked_for(error)}
    program, memory = Program(compiled.as_text()), compiled.memory_analysis()
    held = lambda tree: sum(_local_bytes(leaf) for leaf in jax.tree.leaves(tree))  # noqa: E731
    tokens = config.data.batch_size * config.data.seq_len
    cost = compiled.cost_analysis() or {}
    return {
        "mesh": dict(mesh.shape),
        "sharding": [
            {
                "name": name,
                "shape": list(leaf.shape),
                "spec": str(tuple(leaf.sharding.spec)),
                "bytes_per_device": _local_bytes(leaf),
            }
            for name, leaf in named_arrays(state.model).items()
        ],
        "num_params": spec.num_params,
        "cache_bytes_per_token": spec.cache_bytes_per_token("bfloat16"),
        "parameter_bytes_per_device": held(state.model),
        "gradient_bytes_per_device": held(state.model),
        "optimizer_bytes_per_device": held(state.optimizer),
        "temporary_bytes_per_device": memory.temp_size_in_bytes,
        "peak_bytes_per_device": peak_bytes(compiled),
        "matmul_flops_per_device": program.matmul_flops(),
        "analytic_flops_per_device": _analytic_flops(config, spec, mesh),
        "bytes_accessed_per_device": cost.get("bytes accessed"),
        "tokens_per_step": tokens,
        "collectives": program.collectives(),
    }


def _analytic_flops(config, spec, mesh) -> float:
    """FLOPs a device of a step's matrix products: the model's formula, with the pairs of those
    tiles of attention that are computed, and what train.remat computes again."""
    from qkvjax.kernels.xla import attention as xla

    length = config.data.seq_len
    macs = spec.forward_macs(length)
    for layer in spec.layers:
        skips = layer.causal and mesh.shape["context"] == 1
        tiles = xla.tiles_of(length, skips, layer.window)
        pairs = sum((rows.stop - rows.start) * (seen.stop - seen.start) for rows, seen in tiles)
        macs += 2 * layer.num_heads * layer.head_dim * (pairs - layer.pairs(length))
    again = 0
    if config.train.remat == "block":  # each layer but its last product, whose result is not used
        last = spec.num_layers * spec.feed_forward.top * spec.d_ff
        again = macs - length * spec.d_model * (spec.num_outputs + last)
    return (6 * macs + 2 * again) * config.data.batch_size / mesh.size


def _asked_for(error: Exception) -> int:
    """The bytes for which a compiler found no room; any other error is raised again."""
    found = re.search(r"([\d.]+)([KMGT])\)? exceeds", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
        raise error
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))


def too_large(record: dict) -> str:
    """What to say of a plan that does not fit."""
    from qkvjax.training.fits import REMEDY

    memory = record["memory_bytes_per_device"]
    needs = [
        f"{SAID_OF[name]} does not fit {record['topology']}: it needs"
        f" {formats.num_bytes(program['peak_bytes_per_device'])} a device,"
        f" {formats.num_bytes(program['peak_bytes_per_device'] - memory)} more than there is"
        for name, program in record["programs"].items()
        if not program["fits"]
    ]
    remedy = REMEDY[0].upper() + REMEDY[1:]
    return f"{'; '.join(needs)}. {remedy}"


def _local_bytes(leaf) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _largest(config, devices, own: dict, memory: int) -> dict:
    """The largest micro-batch that fits, on the line through the peaks of the smallest one and of
    the given one (or twice the smallest)."""
    from qkvjax.parallel import rules

    ways = rules.ways("batch", sizes=own["mesh"])
    given, parts = config.data.batch_size // config.train.accumulation, config.train.accumulation
    high = own["peak_bytes_per_device"]
    low = high if given == ways else _peak(config, devices, ways)
    if low > memory:
        return {"largest_micro_batch": 0}
    if given == ways or parts > 1:  # accumulation holds gradients of its own
        given, high = 2 * ways, _peak(config, devices, 2 * ways)
    more = (memory - low) * (given - ways) / max(1, high - low)
    return {"largest_micro_batch": ways * (1 + int(more // ways))}


def _peak(config, devices, batch: int) -> int:
    """Peak bytes a device for a micro-batch."""
    config = configs.changed(config, data={"batch_size": batch}, train={"accumulation": 1})
    return _compiled(config, devices)["peak_bytes_per_device"]


def _sharing(config, devices, sharing: str) -> dict:
    try:
        config = configs.changed(config, model={"sharing": sharing})
        return {"sharing": sharing, **_compiled(config, devices)}
    except UserError as error:  # heads or overrides that forbid it
        return {"sharing": sharing, "refused": str(error)}


def _why_not(row: dict) -> str:
    """Why a sharing has no row in the table."""
    wanted = formats.num_bytes(row.get("peak_bytes_per_device"))
    why = row.get("refused", f"does not fit, it wants {wanted} a device")
    return f"{sharing_name(row['sharing'])}: {why}"


def _batch(config, devices, batch: int, memory: int) -> dict:
    peak = _peak(config, devices, batch)
    return {"micro_batch": batch, "peak_bytes_per_device": peak, "fits": peak <= memory}


def _roofline(own: dict, chip) -> dict:
    """The least seconds a step can take, by FLOPs and by bytes; nothing for virtual devices.

    The products inside kernels of our own or of a library are not in the program's text: where the
    model's formula counts more, it counts.
    """
    if chip is None:
        return {"roofline_seconds": None}
    flops = max(own["matmul_flops_per_device"], own["analytic_flops_per_device"])
    seconds = [flops / chip.peak_flops]
    if own["bytes_accessed_per_device"]:
        seconds.append(own["bytes_accessed_per_device"] / chip.bandwidth)
    return {"roofline_seconds": max(seconds)}


def _lines(config, record: dict) -> list[str]:
    size = formats.num_bytes
    of = lambda name: size(record[name + "_bytes_per_device"])  # noqa: E731
    mesh = ", ".join(f"{axis} {n}" for axis, n in record["mesh"].items() if n > 1) or "one device"
    left = record["memory_bytes_per_device"] - record["peak_bytes_per_device"]
    verdict = f"fits, {size(left)} are left" if left >= 0 else f"{size(-left)} too much"
    kinds = "; ".join(
        f"{kind} {found['count']:,} x, {size(found['bytes'])}"
        for kind, found in record["collectives"].items()
    )
    pairs = [
        (
            "topology",
            f"{record['topology']}: {record['devices']:,} devices"
            f" ({record['device_kind']}) of {of('memory')}; compiled, not run",
        ),
        ("mesh", mesh),
        (
            "batch",
            f"{config.data.batch_size:,} sequences of {config.data.seq_len:,} tokens,"
            f" in {config.train.accumulation} micro-batches",
        ),
        (
            "a device",
            f"parameters {of('parameter')}, gradients {of('gradient')}, optimizer"
            f" {of('optimizer')}; all temporaries, gradients and activations among"
            f" them, {of('temporary')}",
        ),
        ("peak", f"{of('peak')} a device: {verdict}"),
        ("evaluation", _program_text(record, "evaluate")),
        (
            "generation",
            f"{_program_text(record, 'generate')}; one sequence of {config.data.seq_len:,} tokens",
        ),
        (
            "micro-batch",
            f"about {record['largest_micro_batch']:,} sequences fit at once, over all devices",
        ),
        (
            "FLOPs",
            f"{record['matmul_flops_per_device']:.3g} in matrix products a device and"
            f" step, kernels of attention left out;"
            f" {record['analytic_flops_per_device']:.3g} by the model's formula, with them",
        ),
        ("collectives", kinds or "none"),
        ("cache", f"{size(record['cache_bytes_per_token'])} a token in bfloat16, when it decodes"),
    ]
    if seconds := record["roofline_seconds"]:
        speed = record["tokens_per_step"] / seconds
        pairs.append(
            (
                "roofline",
                f"{formats.duration(seconds)} a step at least, {speed:,.0f} tokens/s at"
                " most: an estimate, not a measurement",
            )
        )
    merged = collections.Counter()
    for row in record["sharding"]:
        merged[_kind(row["name"]), str(tuple(row["shape"])), row["spec"]] += row["bytes_per_device"]
    rows = [[*key, size(n)] for key, n in merged.most_common(ROWS)]
    header = [("", "parameter"), ("", "shape"), ("", "sharded over"), ("bytes", "a device")]
    return [*formats.aligned(pairs), "", *formats.table(header, rows)]


def _program_text(record: dict, name: str) -> str:
    """Peak memory of a program, and whether that fits."""
    program = record["programs"][name]
    verdict = "fits" if program["fits"] else "does not fit"
    return f"peak {formats.num_bytes(program['peak_bytes_per_device'])} a device: {verdict}"


def _kind(name: str) -> str:
    """The parameter's name, that of the layers put together."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _sharing_table(rows: list[dict]) -> list[str]:
    header = [
        ("", "sharing"),
        ("", "parameters"),
        ("peak a", "device"),
        ("", "saved"),
        ("FLOPs a", "device"),
        ("sent a", "device"),
        ("cache a", "token"),
    ]
    base = next((row for row in rows if row["sharing"] == SHARINGS[0]), None)
    sent = lambda row: sum(c["bytes"] for c in row["collectives"].values())  # noqa: E731
    cells = [
        [
            sharing_name(row["sharing"]),
            formats.count(row["num_params"]),
            formats.num_bytes(row["peak_bytes_per_device"]),
            formats.NONE
            if base in (None, row)
            else formats.saved(1 - row["peak_bytes_per_device"] / base["peak_bytes_per_device"]),
            f"{row['matmul_flops_per_device']:.3g}",
            formats.num_bytes(sent(row)),
            formats.num_bytes(row["cache_bytes_per_token"]),
        ]
        for row in rows
    ]
    return formats.table(header, cells)


def _batch_table(rows: list[dict]) -> list[str]:
    header = [("", "micro-batch"), ("", "fits"), ("peak a", "device")]
    cells = [
        [
            f"{row['micro_batch']:,}",
            "yes" if row["fits"] else "no",
            formats.num_bytes(row["peak_bytes_per_device"]),
        ]
        for row in rows
    ]
    return formats.table(header, cells)


def _notes(record: dict, chip) -> list[str]:
    notes = [
        "Evaluation: while the optimizer's state stays in memory, as during training."
        " Peak: arguments, results and temporaries that the compiler plans. Bytes of collectives:"
        " of their results on one device, loops counted as often as they run. The largest"
        " micro-batch lies on a line through two compiled peaks."
        " FLOPs by the formula: of the tiles of attention that are computed, and of the layers"
        " once more where train.remat=block computes them again.",
    ]
    if chip is None:
        notes.append("Virtual devices share this machine's memory evenly and have no roofline.")
    return [*notes, UNITS]
