"""The lines that `plan --topology` prints: a summary, tables and notes."""

from __future__ import annotations

import collections

from qkvjax import formats
from qkvjax.attention.spec import SHARINGS, sharing_name
from qkvjax.costs.sharings import UNITS

MOST_PARAMETERS = 12  # rows of the sharding table: the largest; plan.json has all


def summary_lines(config, record: dict) -> list[str]:
    """Returns the summary of a plan and its sharding table."""
    return [*formats.aligned(_summary(config, record)), "", *_sharding_table(record["sharding"])]


def _summary(config, record: dict) -> list[tuple[str, str]]:
    """Returns (label, text) pairs."""

    def size(name: str) -> str:
        return formats.num_bytes(record[f"{name}_bytes_per_device"])

    mesh = ", ".join(f"{axis} {size}" for axis, size in record["mesh"].items() if size > 1)
    collectives = "; ".join(
        f"{kind} {total['count']:,} x, {formats.num_bytes(total['bytes'])}"
        for kind, total in record["collectives"].items()
    )
    free = record["memory_bytes_per_device"] - record["peak_bytes_per_device"]
    verdict = f"fits, {formats.num_bytes(free)} are left"
    if free < 0:
        verdict = f"does not fit, {formats.num_bytes(-free)} too much"
    cache = formats.num_bytes(record["cache_bytes_per_token"])
    pairs = [
        (
            "topology",
            f"{record['topology']}: {record['devices']:,} devices ({record['device_kind']}) of"
            f" {size('memory')}; compiled, not run",
        ),
        ("mesh", mesh or "one device"),
        (
            "batch",
            f"{config.data.batch_size:,} sequences of {config.data.seq_len:,} tokens,"
            f" in {config.train.accumulation} micro-batches",
        ),
        (
            "a device",
            f"parameters {size('parameter')}, gradients {size('gradient')}, optimizer"
            f" {size('optimizer')}; all temporaries (they include gradients and activations)"
            f" {size('temporary')}",
        ),
        ("peak", f"{size('peak')} a device: {verdict}"),
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
            f"{record['matmul_flops_per_device']:.3g} in matrix products a device and step,"
            " without the kernels of attention;"
            f" {record['analytic_flops_per_device']:.3g} by the model's formula, with them",
        ),
        ("collectives", collectives or "none"),
        ("cache", f"{cache} a token in bfloat16, when it decodes"),
    ]
    seconds = record["roofline_seconds"]
    if seconds:
        speed = record["tokens_per_step"] / seconds
        pairs.append(
            (
                "roofline",
                f"{formats.duration(seconds)} a step at least, {speed:,.0f} tokens/s at most: an"
                " estimate, not a measurement",
            )
        )
    return pairs


def _program_text(record: dict, name: str) -> str:
    """Returns the peak memory of a program, and whether it fits."""
    program = record["programs"][name]
    verdict = "fits" if program["fits"] else "does not fit"
    return f"peak {formats.num_bytes(program['peak_bytes_per_device'])} a device: {verdict}"


def _sharding_table(sharding: list[dict]) -> list[str]:
    """Returns the table of the largest parameters, those of equal layers in one row."""
    totals = collections.Counter()
    for parameter in sharding:
        kind = _without_layer(parameter["name"])
        key = (kind, str(tuple(parameter["shape"])), parameter["spec"])
        totals[key] += parameter["bytes_per_device"]
    header = [("", "parameter"), ("", "shape"), ("", "sharded over"), ("bytes", "a device")]
    largest = totals.most_common(MOST_PARAMETERS)
    return formats.table(header, [[*key, formats.num_bytes(total)] for key, total in largest])


def _without_layer(name: str) -> str:
    """Returns the name of a parameter with "*" for the number of its layer."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def sharing_lines(rows: list[dict]) -> list[str]:
    """Returns a table with a row for each sharing that compiles, and why the others do not."""
    compiled = [row for row in rows if "sharding" in row]
    missing = [_reason(row) for row in rows if "sharding" not in row]
    baseline = next((row for row in compiled if row["sharing"] == SHARINGS[0]), None)
    header = [
        ("", "sharing"),
        ("", "parameters"),
        ("peak a", "device"),
        ("", "saved"),
        ("FLOPs a", "device"),
        ("sent a", "device"),
        ("cache a", "token"),
    ]
    table = formats.table(header, [_sharing_cells(row, baseline) for row in compiled])
    return [*table, *formats.notes(missing)]


def _sharing_cells(row: dict, baseline: dict | None) -> list[str]:
    peak = row["peak_bytes_per_device"]
    saved = formats.NONE
    if baseline is not None and row is not baseline:
        saved = formats.saved(1 - peak / baseline["peak_bytes_per_device"])
    sent = sum(total["bytes"] for total in row["collectives"].values())
    return [
        sharing_name(row["sharing"]),
        formats.count(row["num_params"]),
        formats.num_bytes(peak),
        saved,
        f"{row['matmul_flops_per_device']:.3g}",
        formats.num_bytes(sent),
        formats.num_bytes(row["cache_bytes_per_token"]),
    ]


def _reason(row: dict) -> str:
    """Returns why a sharing has no row in the table."""
    reason = row.get("refused")
    if reason is None:
        peak = formats.num_bytes(row["peak_bytes_per_device"])
        reason = f"does not fit: it needs {peak} on each device"
    return f"{sharing_name(row['sharing'])}: {reason}"


def batch_lines(rows: list[dict]) -> list[str]:
    """Returns a table with a row for each micro-batch."""
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


def notes(is_virtual: bool) -> list[str]:
    """Returns what the figures mean, as wrapped lines.

    Args:
      is_virtual: the devices are virtual ones of this machine.
    """
    texts = [
        "Evaluation: the optimizer's state stays in memory, as during training. Peak: arguments,"
        " results and temporaries that the compiler plans. Bytes of collectives: those of their"
        " results on one device; what is in a loop counts as often as it runs. The largest"
        " micro-batch lies on a line through two compiled peaks. FLOPs by the formula: of the tiles"
        " of attention that are computed, and of the layers once more where train.remat=block"
        " computes them again.",
    ]
    if is_virtual:
        texts.append("Virtual devices share this machine's memory evenly and have no roofline.")
    return formats.notes([*texts, UNITS])
