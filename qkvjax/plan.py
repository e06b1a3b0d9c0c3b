"""What a model costs, before anything is trained; no accelerator, no weights, no waiting.

  qkvjax plan --model=config.json                    a Hugging Face file, or its folder
  qkvjax plan --model=config.json --memory=141GiB --bandwidth=4.8TB/s --context=32768
  qkvjax plan --config=configs/lm.py:size=124m,sharing=q-k=v --workdir=runs/plan
  qkvjax plan --config=configs/lm.py:size=124m --topology=v5e-16 --all_sharings

--model reads a stranger's config.json (Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma 1 to 4,
gpt-oss, GPT-2 and what has their keys) and prints what each sharing of its projections would
save: cache, parameters, context, users, and a roofline estimate of decoding speed.

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

from qkvjax import cli
from qkvjax.analysis import columns, costs, formats, roofline
from qkvjax.attention.spec import itemsize
from qkvjax.errors import UserError
from qkvjax.training import metrics

DEVICE = "one H100 SXM"
MEMORY, BANDWIDTH = "80GB", "3.35TB/s"
LONGEST_DEFAULT_CONTEXT = 131_072
FOR_MODEL = ("memory", "bandwidth", "context", "weight_dtype", "cache_dtype")


FLAGS = {
    "model": (str, None, "a Hugging Face config.json, or the folder that holds it"),
    "memory": (str, MEMORY, f"bytes for weights and cache, as 80GB or 141GiB; of {DEVICE}"),
    "bandwidth": (str, BANDWIDTH, f"bytes that memory delivers a second; of {DEVICE}"),
    "weight_dtype": (str, "bfloat16", "of the weights: bfloat16, float16, float32 or int8"),
    "cache_dtype": (str, "bfloat16", "of the cache: bfloat16, float16, float32 or int8"),
    "topology": (str, None, "compile for hardware that is not here: v5e-16, v6e-256, h200-8,"
                 " cpu:8"),
    "workdir": (str, None, "where plan.json goes; made when absent"),
    "context": (int, None, "tokens of each user; unset means the model's maximum, at most 131072",
                1, 10**12),
    "all_sharings": (bool, False, "with --topology: a row a sharing"),
    "batches": (list, [], "with --topology: a row for each micro-batch"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The door; returns its exit code."""
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
        metrics.write_json(path, {"command": command, **record})
        lines += ["", f"written: {path}"]
    print("\n".join(lines))
    if record.get("fits") is False:
        from qkvjax.analysis import compiled

        raise UserError(compiled.too_large(record))


def plan_recipe(values: flags.FlagValues) -> tuple[list[str], dict]:
    """The same for --config."""
    if given := [name for name in ("all_sharings", "batches") if values[name].present]:
        raise UserError(f"--{given[0]} goes with --topology: give both or none")
    return costs.recipe_costs(values.config)


def plan_topology(values: flags.FlagValues) -> tuple[list[str], dict]:
    """The same for --config with --topology."""
    from qkvjax.analysis import compiled

    try:
        batches = [int(word) for word in values.batches]
    except ValueError:
        batches = [0]
    if any(batch < 1 for batch in batches):
        raise UserError(f"--batches={','.join(values.batches)}: give whole numbers, as 1,4,16")
    given = values["memory"].present
    memory = roofline.parse_bytes(values.memory, "--memory") if given else None
    before, exact = costs.recipe_costs(values.config)
    more = {"memory": memory, "all_sharings": values.all_sharings, "batches": batches}
    lines, record = compiled.plan(values.config, values.topology, **more)
    return [*before, "", *lines], exact | record


def plan_model(values: flags.FlagValues) -> tuple[list[str], dict]:
    """The lines to print for --model and the record for plan.json."""
    from qkvjax.interop import huggingface

    model = huggingface.read(values.model)
    memory = roofline.parse_bytes(values.memory, "--memory")
    bandwidth = roofline.parse_bytes(values.bandwidth, "--bandwidth", per_second=True)
    weight_size, _ = itemsize(values.weight_dtype), itemsize(values.cache_dtype)
    context = _context(values.context, model)
    specs = tuple(layer.attention for layer in model.layers)
    own = specs[0].sharing if len({s.sharing for s in specs}) == 1 else "as is"
    found = costs.variants(specs)
    first = next(v for v in found if v.sharing == own and v.heads == "as is")

    def row(variant: costs.Variant, layout: str | None = None) -> dict:
        changed = model.with_attention(variant.specs)
        read = [(spec.cache_bytes_per_token(values.cache_dtype, layout), spec.window)
                for spec in variant.specs]  # fmt: skip
        held = [item for item, layer in zip(read, model.layers) if not layer.reuses_cache]
        free = memory - changed.num_params * weight_size
        users = roofline.most_sequences(held, context, free)

        def speed(batch: int) -> float:
            weight_bytes = changed.read_params(batch) * weight_size
            cache_bytes = roofline.held_bytes(read, context)
            return roofline.decode_tokens_per_second(bandwidth, weight_bytes, cache_bytes, batch)

        return {
            "name": variant.name + (", one tensor" if variant is first and not layout else ""),
            "sharing": variant.sharing, "heads": variant.heads,
            "num_kv_heads": variant.num_kv_heads, "layout": layout or variant.layout,
            "as_is": layout is not None, "num_params": changed.num_params,
            "params_saved": model.num_params - changed.num_params,
            "cache_bytes_per_token": sum(size for size, _ in held),
            "cache_bytes_at_context": roofline.held_bytes(held, context),
            "longest_context": roofline.longest_context(held, free), "users": users,
            "tokens_per_second_1_user": speed(1) if users else None,
            "tokens_per_second_most_users": speed(users) if users else None,
        }  # fmt: skip

    # Engines store K and V apart even where their projection is one, so that is "as it is".
    rows = [row(first, "kv")]
    rows += [row(v) for v in found if v is not first or own != "q-k-v"]
    for one in rows:
        base = rows[0]["cache_bytes_at_context"]
        one["cache_saved"] = 1 - one["cache_bytes_at_context"] / base
    record = {
        "model": str(values.model), "num_params": model.num_params,
        "active_params": model.active_params, "forward_macs": model.forward_macs(context),
        "cache_bytes_per_token": rows[0]["cache_bytes_per_token"], "context": context,
        "memory_bytes": memory, "bandwidth_bytes_per_second": bandwidth,
        "weight_dtype": values.weight_dtype, "cache_dtype": values.cache_dtype, "rows": rows,
    }  # fmt: skip
    return _model_lines(values, model, record), record


def _context(given: int | None, model) -> int:
    if given is None and model.max_length is None:
        raise UserError(
            "the file lacks the key 'max_position_embeddings': give --context=TOKENS instead"
        )
    if given and model.learned_positions and given > model.max_length:
        raise UserError(
            f"--context={given} is beyond the {model.max_length} learned positions of the model:"
            " give fewer"
        )
    return given or min(model.max_length, LONGEST_DEFAULT_CONTEXT)


def _model_lines(values: flags.FlagValues, model, record: dict) -> list[str]:
    size = itemsize(values.weight_dtype)
    specs = [layer.attention for layer in model.layers]
    weights, memory = model.num_params * size, record["memory_bytes"]
    context = record["context"]
    active = ""
    if record["active_params"] != record["num_params"]:
        active = f"; {record['active_params']:,} of them active for a token"
    left = formats.num_bytes(memory - weights) + " left for the cache"
    if weights >= memory:
        left = "too small for the weights: nothing fits"
    device = {name: f", {DEVICE}" for name in ("memory", "bandwidth") if not values[name].present}
    made_for = f" (the model was made for {model.max_length:,})" if model.max_length else ""
    lines = columns.aligned(
        [
            ("model", f"{model.model_type}, {len(specs)} layers of width {specs[0].d_model:,},"
                      f" {costs.describe_heads(specs)}"),
            ("parameters", f"{record['num_params']:,}{active}"),
            ("weights", f"{formats.num_bytes(weights)} in {values.weight_dtype}"),
            ("memory", f"{values.memory} = {formats.num_bytes(memory)}"
                       f"{device.get('memory', '')}: {left}"),
            ("bandwidth", f"{values.bandwidth.removesuffix('/s')}/s{device.get('bandwidth', '')}"),
            ("context", f"{context:,} tokens a user{made_for}; cache in {values.cache_dtype}"),
            ("forward", f"{formats.count(record['forward_macs'])} multiply-adds for one"
                        f" sequence of {context:,} tokens"),
        ]
    )  # fmt: skip
    rows = [_model_cells(one) for one in record["rows"]]
    header = [
        ("", "sharing"), ("", "KV heads"), ("cache a", "token"), ("cache a", "user"),
        ("", "saved"), ("params", "saved"), ("longest", "context"),
        ("most", "users"), ("tokens/s", "1 user"), ("tokens/s", "most users"),
    ]  # fmt: skip
    notes = columns.notes(_model_notes(values, model, record))
    return [*lines, "", *columns.table(header, rows), "", *notes]


def _model_cells(one: dict) -> list[str]:
    longest = one["longest_context"]
    speeds = [one["tokens_per_second_1_user"], one["tokens_per_second_most_users"]]
    return [
        one["name"], costs.heads_cell(one), formats.num_bytes(one["cache_bytes_per_token"]),
        formats.num_bytes(one["cache_bytes_at_context"]),
        formats.NONE if one["as_is"] else formats.saved(one["cache_saved"]),
        formats.NONE if one["as_is"] else formats.signed(formats.count(one["params_saved"])),
        "any" if longest is None else formats.count(longest), f"{one['users']:,}",
        *(formats.NONE if speed is None else _figures(speed) for speed in speeds),
    ]  # fmt: skip


def _figures(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def _model_notes(values: flags.FlagValues, model, record: dict) -> list[str]:
    specs = tuple(layer.attention for layer in model.layers)
    notes = costs.head_notes(specs)
    if windowed := [s.window for s in specs if s.window is not None]:
        notes.append(
            f"{len(windowed)} of {len(specs)} layers hold at most their window of"
            f" {windowed[0]:,} tokens: counted in the cache of a user, contexts and users; the"
            " cache of a token is that of all layers."
        )
    if borrowed := sum(layer.reuses_cache for layer in model.layers):
        notes.append(f"{borrowed} layers read the cache of an earlier layer and hold none.")
    if shared := sum(s.shares_kv for s in specs):
        notes.append(
            f"{shared} of {len(specs)} layers have one projection for K and V. Engines store both"
            " today, which is the first row; the second stores one tensor there, with the"
            " same weights."
        )
    if any(layer.num_experts for layer in model.layers):
        notes.append(
            "Experts read in a step are those that uniform routing reaches on average; the"
            " weights of all of them are held."
        )
    longest = "Longest context: what memory allows one user"
    if any(one["longest_context"] is None for one in record["rows"]):
        longest += "; any: every layer is windowed, and the windows fit"
    if model.learned_positions:
        longest += "; positions are learned, so the model itself ends at its own"
    notes.append(longest + ".")
    if values.cache_dtype == "int8":
        notes.append("The cache in int8 is counted with its scales: two bytes a head and token.")
    if values.weight_dtype == "int8":
        notes.append("Weights in int8 are counted without scales, a few percent more in practice.")
    notes += model.notes
    if any(s.rope for s in specs):
        notes.append(
            "K=V with RoPE saves cache only in an engine that stores the un-rotated state once"
            " (rotary values raw) or rotates the output back; with K and V stored apart it saves"
            " parameters alone."
        )
    notes.append(
        "Sharing must be trained in: tying the projections of a finished model without training"
        " it further destroys it. What it costs in quality, only a run tells: qkvjax study."
    )
    notes.append(
        "Tokens/s are a roofline estimate, an upper bound and not a measurement: bandwidth over"
        f" the weights and the caches of full contexts that a step reads. {costs.UNITS}"
    )
    return notes


if __name__ == "__main__":
    sys.exit(main())
