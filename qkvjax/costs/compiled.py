"""Training, evaluation and generation compiled for hardware that is not present: whether they fit,
and what a training step sends between devices.

`plan` compiles and collects a record; `train_program` describes one compiled training step, and
`compiled_text` turns the record into lines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from qkvjax import config as configs
from qkvjax import formats
from qkvjax.attention.spec import SHARINGS
from qkvjax.costs import compiled_text
from qkvjax.costs.train_program import compile_train_step, requested_bytes
from qkvjax.errors import UserError

PROGRAMS = {"train": "the train step", "evaluate": "the evaluation", "generate": "generation"}


def plan(
    config, name: str, *, memory: int | None = None, all_sharings: bool = False, batches=()
) -> tuple[list[str], dict]:
    """Compiles the programs of a language model for a topology.

    Args:
      config: what is trained. If all axes of its mesh have size 1, mesh.fsdp takes all devices.
      name: of the topology, such as "v5e-16".
      memory: bytes of a device; None means those of the chip.
      all_sharings: adds a row for each sharing.
      batches: adds a row for each of these sizes of a micro-batch, over the whole mesh.

    Returns:
      (lines to print, record for plan.json).

    Raises:
      UserError: the topology does not exist or has no compiler here, or its mesh does not divide
        the model or the batch.
    """
    from qkvjax.parallel import topology

    target = topology.read(name)
    if config.model.kind != "lm":
        raise UserError("--topology compiles language models: choose a config with model.kind=lm")
    devices = topology.devices(target)
    if target.count > 1 and all(size == 1 for size in config.mesh.sizes.values()):
        config = configs.changed(config, mesh={"fsdp": -1})
    if memory is None:
        memory = target.chip.memory if target.chip else _host_memory() // target.count

    train = compile_train_step(config, devices)
    programs = _peaks(config, devices, train)
    for program in programs.values():
        program["fits"] = program["peak_bytes_per_device"] <= memory
    record = {
        "topology": name,
        "devices": target.count,
        "device_kind": devices[0].device_kind,
        "memory_bytes_per_device": memory,
        **train,
        "programs": programs,
        "fits": all(program["fits"] for program in programs.values()),
    }
    if "sharding" not in train:  # the compiler found no room for the train step
        return [], record

    record["largest_micro_batch"] = _largest_micro_batch(config, devices, train, memory)
    record["roofline_seconds"] = _roofline_seconds(train, target.chip)
    lines = compiled_text.summary_lines(config, record)
    if all_sharings:
        record["sharings"] = [_sharing(config, devices, sharing) for sharing in SHARINGS]
        lines += ["", *compiled_text.sharing_lines(record["sharings"])]
    if batches:
        record["batches"] = [_batch(config, devices, size, memory) for size in batches]
        lines += ["", *compiled_text.batch_lines(record["batches"])]
    return [*lines, "", *compiled_text.notes(is_virtual=target.chip is None)], record


def too_large(record: dict) -> str:
    """Returns the error message for a plan that does not fit."""
    from qkvjax.training.fits import REMEDY

    memory = record["memory_bytes_per_device"]
    problems = []
    for name, program in record["programs"].items():
        if not program["fits"]:
            peak = program["peak_bytes_per_device"]
            problems.append(
                f"{PROGRAMS[name]} does not fit {record['topology']}: it needs"
                f" {formats.num_bytes(peak)} on each device,"
                f" {formats.num_bytes(peak - memory)} more than a device has"
            )
    remedy = REMEDY[0].upper() + REMEDY[1:]
    return f"{'; '.join(problems)}. {remedy}"


def _host_memory() -> int:
    """Returns the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _peaks(config, devices, train: dict) -> dict[str, dict]:
    """Returns the `peak_bytes_per_device` of each program that a run executes, by its name.

    Args:
      train: of `compile_train_step`.
    """
    from qkvjax.evaluation.evaluators import compile_scoring
    from qkvjax.generation.serving import compile_generation
    from qkvjax.parallel.mesh import for_generation, make_mesh
    from qkvjax.training.run import abstract_state, planned_spec
    from qkvjax.training.step import make_optimizer

    spec = planned_spec(config)

    def evaluation() -> list:
        mesh = make_mesh(config.mesh.sizes, devices)
        optimizer, _ = make_optimizer(config, 1000, 10)
        model = abstract_state(spec, optimizer, mesh, config).model
        return [compile_scoring(config, model, mesh)]

    def generation() -> list:
        mesh = for_generation(spec, devices) or make_mesh({}, devices[:1])
        length = config.data.seq_len
        dtype = config.train.compute_dtype
        programs = compile_generation(spec, mesh, batch=1, context=length, dtype=dtype)
        return list(programs.values())

    # While a run is evaluated, the state of its optimizer stays on the devices.
    optimizer_bytes = train.get("optimizer_bytes_per_device", 0)
    peaks = {
        "train": train["peak_bytes_per_device"],
        "evaluate": _largest_peak(evaluation) + optimizer_bytes,
        "generate": _largest_peak(generation),
    }
    return {name: {"peak_bytes_per_device": peak} for name, peak in peaks.items()}


def _largest_peak(compile_programs: Callable[[], Iterable]) -> int:
    """Returns the largest peak of compiled programs, or the bytes for which there was no room."""
    import jax

    from qkvjax.training.fits import peak_bytes

    try:
        return max(peak_bytes(program) or 0 for program in compile_programs())
    except jax.errors.JaxRuntimeError as error:
        return requested_bytes(error)


def _largest_micro_batch(config, devices, train: dict, memory: int) -> int:
    """Returns about the largest micro-batch that fits.

    It lies on the line through two compiled peaks: that of the smallest micro-batch and that of the
    configured one. Twice the smallest replaces the configured one where the two are the same, and
    with accumulation, which holds gradients of its own.
    """
    from qkvjax.parallel import rules

    smallest = rules.ways("batch", sizes=train["mesh"])
    accumulation = config.train.accumulation
    size = config.data.batch_size // accumulation
    peak = train["peak_bytes_per_device"]
    smallest_peak = peak if size == smallest else _train_peak(config, devices, smallest)
    if smallest_peak > memory:
        return 0
    if size == smallest or accumulation > 1:
        size = 2 * smallest
        peak = _train_peak(config, devices, size)
    more = (memory - smallest_peak) * (size - smallest) / max(1, peak - smallest_peak)
    return smallest * (1 + int(more // smallest))


def _train_peak(config, devices, batch: int) -> int:
    """Returns the peak bytes on a device of a train step with one micro-batch of this size."""
    config = configs.changed(config, data={"batch_size": batch}, train={"accumulation": 1})
    return compile_train_step(config, devices)["peak_bytes_per_device"]


def _roofline_seconds(train: dict, chip) -> float | None:
    """Returns the least seconds that a step can take, by FLOPs and by bytes.

    The text of a program lacks the products inside kernels, ours or a library's. So the FLOPs are
    those of the text or of the model's formula, whichever are more.

    Args:
      chip: of the topology; None for virtual devices, which have no roofline.
    """
    if chip is None:
        return None
    flops = max(train["matmul_flops_per_device"], train["analytic_flops_per_device"])
    seconds = flops / chip.peak_flops
    num_bytes = train["bytes_accessed_per_device"]
    if num_bytes:
        seconds = max(seconds, num_bytes / chip.bandwidth)
    return seconds


def _sharing(config, devices, sharing: str) -> dict:
    """Returns a row for a sharing, or why there is none: under "refused"."""
    try:
        config = configs.changed(config, model={"sharing": sharing})
        return {"sharing": sharing, **compile_train_step(config, devices)}
    except UserError as error:  # the numbers of heads or model.layer_overrides forbid it
        return {"sharing": sharing, "refused": str(error)}


def _batch(config, devices, size: int, memory: int) -> dict:
    peak = _train_peak(config, devices, size)
    return {"micro_batch": size, "peak_bytes_per_device": peak, "fits": peak <= memory}
