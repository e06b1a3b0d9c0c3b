"""What a published model costs and what each sharing would save: the tables of `plan --model`.

Nothing here imports jax.
"""

from __future__ import annotations

from collections.abc import Mapping

from absl import flags

from qkvjax import formats
from qkvjax.attention.spec import itemsize
from qkvjax.costs import roofline, sharings
from qkvjax.errors import UserError
from qkvjax.interop import huggingface
from qkvjax.interop.latent import LatentSpec
from qkvjax.interop.shapes import Model, cache_reads

LONGEST_DEFAULT_CONTEXT = 131_072
ABOUT = "≈"
_HEADER = [
    ("", "sharing"),
    ("", "KV heads"),
    ("cache a", "token"),
    ("cache a", "user"),
    ("", "saved"),
    ("params", "saved"),
    ("longest", "context"),
    ("most", "users"),
    ("tokens/s", "1 user"),
    ("tokens/s", "most users"),
]


def plan(
    values: flags.FlagValues, given: Mapping[str, bool], device: str
) -> tuple[list[str], dict]:
    """Returns the lines to print for `--model` and the record for plan.json.

    Args:
      values: the flags of `plan`.
      given: for the flags of `--model`, whether the user set them.
      device: what the defaults of memory and bandwidth describe.

    Raises:
      UserError: a file that cannot be counted, or impossible flags.
    """
    model = huggingface.read(values.model)
    stored = model.quantization
    weight_size = itemsize(values.weight_dtype)
    weight_dtype = values.weight_dtype
    if stored is not None and not given["weight_dtype"]:
        if stored.bits is None:
            raise UserError(
                f"{values.model}: how wide its quantization_config ({stored.method!r}) makes a"
                " weight is not known to plan: give --weight_dtype=int8 or =bfloat16 to count all"
                " weights in one width"
            )
        weight_size = None
        weight_dtype = stored.method
    itemsize(values.cache_dtype)  # an unknown one is an error before anything is counted
    record = {
        "model": str(values.model),
        "exact": model.exact,
        "estimate": model.estimate,
        "counted": model.part or "the whole model",
        "num_params": model.num_params,
        "active_params": model.active_params,
        "context": _context(values.context, model),
        "memory_bytes": roofline.parse_bytes(values.memory, "--memory"),
        "bandwidth_bytes_per_second": roofline.parse_bytes(
            values.bandwidth, "--bandwidth", per_second=True
        ),
        "weight_dtype": weight_dtype,
        "weight_bytes": round(model.weight_bytes(weight_size)),
        "cache_dtype": values.cache_dtype,
    }
    record["forward_macs"] = model.forward_macs(record["context"])
    record["rows"] = _rows(model, record, weight_size)
    record["cache_bytes_per_token"] = record["rows"][0]["cache_bytes_per_token"]
    lines = _heading(values, given, device, model, record)
    table = formats.table(_HEADER, [_cells(one, model) for one in record["rows"]])
    notes = formats.notes(_notes(values, model, record))
    return [*lines, "", *table, "", *notes], record


def _rows(model: Model, record: dict, weight_size: int | None) -> list[dict]:
    """Returns a row for the model as it is and for every sharing that its heads allow."""
    specs = tuple(layer.attention for layer in model.layers)
    if isinstance(specs[0], LatentSpec):
        as_is = sharings.Variant("latent", "as is", specs)
        rows = [_row(model, as_is, record, weight_size, "latent", name="MLA")]
    else:
        kinds = {spec.sharing for spec in specs}
        own = specs[0].sharing if len(kinds) == 1 else "as is"
        variants = sharings.variants(specs)
        first = next(v for v in variants if v.sharing == own and v.heads == "as is")
        # Engines store K and V apart even where their projection is one, so that is "as it is".
        rows = [_row(model, first, record, weight_size, "kv")]
        for variant in variants:
            if variant is not first:
                rows.append(_row(model, variant, record, weight_size))
            elif own != "q-k-v":
                name = f"{variant.name}, one tensor"
                rows.append(_row(model, variant, record, weight_size, name=name))
    for one in rows:
        base = rows[0]["cache_bytes_at_context"]
        one["cache_saved"] = 1 - one["cache_bytes_at_context"] / base
    return rows


def _row(
    model: Model,
    variant: sharings.Variant,
    record: dict,
    weight_size: int | None,
    layout: str | None = None,
    name: str = "",
) -> dict:
    """Returns one row; `layout` is given for the model as it is today."""
    context = record["context"]
    changed = model.with_attention(variant.specs)
    reads = []
    holds = []
    for layer in changed.layers:
        spec = layer.attention
        reads += cache_reads(spec, record["cache_dtype"], layout)
        if not layer.reuses_cache:
            size = spec.cache_bytes_per_token(record["cache_dtype"], layout)
            holds.append((size, spec.window))
    free = record["memory_bytes"] - changed.weight_bytes(weight_size)
    users = roofline.most_sequences(holds, context, free)

    def speed(batch: int) -> float:
        return roofline.decode_tokens_per_second(
            record["bandwidth_bytes_per_second"],
            changed.read_bytes(batch, weight_size),
            roofline.held_bytes(reads, context),
            batch,
        )

    return {
        "name": name or variant.name,
        "sharing": variant.sharing,
        "heads": variant.heads,
        "num_kv_heads": variant.num_kv_heads,
        "layout": layout or variant.layout,
        "as_is": layout is not None,
        "num_params": changed.num_params,
        "params_saved": model.num_params - changed.num_params,
        "cache_bytes_per_token": sum(size for size, _ in holds),
        "cache_bytes_at_context": roofline.held_bytes(holds, context),
        "longest_context": roofline.longest_context(holds, free),
        "users": users,
        "tokens_per_second_1_user": speed(1) if users else None,
        "tokens_per_second_most_users": speed(users) if users else None,
    }


def _context(given: int | None, model: Model) -> int:
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


def _heading(
    values: flags.FlagValues,
    given: Mapping[str, bool],
    device: str,
    model: Model,
    record: dict,
) -> list[str]:
    """Returns the lines above the table; the first says so where figures are estimates."""
    about = "" if model.exact else ABOUT
    specs = [layer.attention for layer in model.layers]
    weights = record["weight_bytes"]
    memory = record["memory_bytes"]
    active = ""
    if record["active_params"] != record["num_params"]:
        active = f"; {about}{record['active_params']:,} of them active for a token"
    left = about + formats.num_bytes(memory - weights) + " left for the cache"
    if weights >= memory:
        left = "too small for the weights: nothing fits"
    default = {name: "" if given[name] else f", {device}" for name in ("memory", "bandwidth")}
    made_for = f" (the model was made for {model.max_length:,})" if model.max_length else ""
    name = model.model_type or "no model_type"
    shape = f"{name}, {len(specs)} layers of width {specs[0].d_model:,}, {_heads(specs)}"
    pairs = [("model", shape)]
    if model.part:
        pairs.append(("counted", model.part))
    pairs += [
        ("parameters", f"{about}{record['num_params']:,}{active}"),
        ("weights", about + formats.num_bytes(weights) + _width(record, model)),
        ("memory", f"{values.memory} = {formats.num_bytes(memory)}{default['memory']}: {left}"),
        ("bandwidth", f"{values.bandwidth.removesuffix('/s')}/s{default['bandwidth']}"),
        (
            "context",
            f"{record['context']:,} tokens a user{made_for}; cache in {values.cache_dtype}",
        ),
        (
            "forward",
            f"{about}{formats.count(record['forward_macs'])} multiply-adds for one"
            f" sequence of {record['context']:,} tokens",
        ),
    ]
    lines = formats.aligned(pairs)
    if model.exact:
        return lines
    return [*formats.aligned([(f"{ABOUT} estimate", model.estimate)]), "", *lines]


def _width(record: dict, model: Model) -> str:
    stored = model.quantization
    if stored is None or record["weight_dtype"] != stored.method:
        return f" in {record['weight_dtype']}"
    part = "experts" if stored.only_experts else "matrices"
    return (
        f" as the file stores them: {stored.method}, {stored.bits:.4g} bits a number of the"
        f" {part}, scales included, and 16 bits for the rest"
    )


def _heads(specs: list) -> str:
    if not isinstance(specs[0], LatentSpec):
        return sharings.describe_heads(specs)
    spec = specs[0]
    return (
        f"{spec.num_heads} query heads over one latent of {spec.kv_rank} + {spec.rope_dim} numbers"
    )


def _cells(one: dict, model: Model) -> list[str]:
    longest = one["longest_context"]
    speeds = [one["tokens_per_second_1_user"], one["tokens_per_second_most_users"]]
    saved = formats.signed(formats.count(one["params_saved"]))
    figures = [
        formats.num_bytes(one["cache_bytes_per_token"]),
        formats.num_bytes(one["cache_bytes_at_context"]),
        formats.NONE if one["as_is"] else formats.saved(one["cache_saved"]),
        formats.NONE if one["as_is"] else saved,
        "any" if longest is None else formats.count(longest),
        f"{one['users']:,}",
        *(formats.NONE if speed is None else _figures(speed) for speed in speeds),
    ]
    if not model.exact:
        figures = [cell if cell == formats.NONE else ABOUT + cell for cell in figures]
    return [one["name"], sharings.heads_cell(one), *figures]


def _figures(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def _notes(values: flags.FlagValues, model: Model, record: dict) -> list[str]:
    specs = tuple(layer.attention for layer in model.layers)
    latent = isinstance(specs[0], LatentSpec)
    notes = _latent_notes(specs[0]) if latent else sharings.head_notes(specs)
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
    notes += _width_notes(values, model, record)
    notes += model.notes
    if not latent:
        notes += _sharing_notes(specs)
    notes.append(
        "Tokens/s are a roofline estimate, an upper bound and not a measurement: bandwidth over"
        f" the weights and the caches of full contexts that a step reads. {sharings.UNITS}"
    )
    return notes


def _width_notes(values: flags.FlagValues, model: Model, record: dict) -> list[str]:
    notes = []
    stored = model.quantization
    if values.cache_dtype == "int8":
        notes.append("The cache in int8 is counted with its scales: two bytes a head and token.")
    if record["weight_dtype"] == "int8":
        notes.append("Weights in int8 are counted without scales, a few percent more in practice.")
    if stored is not None and record["weight_dtype"] != stored.method:
        notes.append(
            f"The file's width ({stored.method}) is left aside for --weight_dtype:"
            " all weights are counted in that."
        )
    return notes


def _latent_notes(spec: LatentSpec) -> list[str]:
    notes = [
        "Keys and values of all heads are read from one latent already, so no other sharing has a"
        f" row: a layer caches {spec.kv_rank} numbers of the latent and {spec.rope_dim} of the"
        " rotary key a token, not K and V of every head. An engine that writes out keys and values"
        " caches many times that."
    ]
    if spec.index_dim:
        notes.append(
            f"The indexer caches {spec.index_dim} numbers a token and layer more; a step reads"
            f" those of all tokens and the latents of {spec.index_topk:,} tokens."
        )
    return notes


def _sharing_notes(specs: tuple) -> list[str]:
    notes = []
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
    return notes
