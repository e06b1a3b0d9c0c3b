"""What a published model costs, and what each sharing would save: the tables of `plan --model`.

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
ABOUT = "≈"  # before every figure that is an estimate
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
      UserError: the file describes a model whose costs are not known, or a flag is impossible.
    """
    model = huggingface.read(values.model)
    weight_dtype, weight_size = _weight_width(values, given, model)
    itemsize(values.cache_dtype)  # raises for an unknown one, before anything is counted
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
    table = formats.table(_HEADER, [_cells(row, model) for row in record["rows"]])
    notes = formats.notes(_notes(values, model, record))
    return [*lines, "", *table, "", *notes], record


def _weight_width(
    values: flags.FlagValues, given: Mapping[str, bool], model: Model
) -> tuple[str, int | None]:
    """Returns (name, bytes) of the width in which weights are counted.

    Without --weight_dtype a quantised file is counted at the width in which it stores its weights;
    the bytes are then None.
    """
    stored = model.quantization
    if stored is None or given["weight_dtype"]:
        return values.weight_dtype, itemsize(values.weight_dtype)
    if stored.bits is None:
        raise UserError(
            f"{values.model}: plan does not know how many bits a weight has in its"
            f" quantization_config ({stored.method!r}): give --weight_dtype=int8 or =bfloat16 to"
            " count all weights in one width"
        )
    return stored.method, None


def _rows(model: Model, record: dict, weight_size: int | None) -> list[dict]:
    """Returns a row for the model as it is, the first, and for every sharing its heads allow."""
    specs = tuple(layer.attention for layer in model.layers)
    if isinstance(specs[0], LatentSpec):
        latent = sharings.Variant("latent", "as is", specs)
        rows = [_row(model, latent, record, weight_size, "latent", name="MLA")]
    else:
        rows = _sharing_rows(model, specs, record, weight_size)
    base = rows[0]["cache_bytes_at_context"]
    for row in rows:
        row["cache_saved"] = 1 - row["cache_bytes_at_context"] / base
    return rows


def _sharing_rows(model: Model, specs: tuple, record: dict, weight_size: int | None) -> list[dict]:
    model_sharings = {spec.sharing for spec in specs}
    sharing = specs[0].sharing if len(model_sharings) == 1 else "as is"
    variants = sharings.variants(specs)
    as_is = next(v for v in variants if (v.sharing, v.heads) == (sharing, "as is"))
    # Engines store K and V apart even where one projection makes both: the model "as it is".
    rows = [_row(model, as_is, record, weight_size, "kv")]
    for variant in variants:
        if variant is not as_is:
            rows.append(_row(model, variant, record, weight_size))
        elif sharing != "q-k-v":
            name = f"{variant.name}, one tensor"
            rows.append(_row(model, variant, record, weight_size, name=name))
    return rows


def _row(
    model: Model,
    variant: sharings.Variant,
    record: dict,
    weight_size: int | None,
    layout: str | None = None,
    name: str = "",
) -> dict:
    """Returns what a variant costs.

    Args:
      record: of `plan`: context, memory, bandwidth and dtypes.
      layout: how today's engines store the cache of the model as it is; None for the layout of
        the variant.
      name: of the row; "" for that of the variant.
    """
    context = record["context"]
    changed = model.with_attention(variant.specs)
    read = []  # cache layers that a step reads
    stored = []  # cache layers that take memory
    for layer in changed.layers:
        spec = layer.attention
        read += cache_reads(spec, record["cache_dtype"], layout)
        if not layer.reuses_cache:
            size = spec.cache_bytes_per_token(record["cache_dtype"], layout)
            stored.append((size, spec.window))
    free = record["memory_bytes"] - changed.weight_bytes(weight_size)
    users = roofline.most_sequences(stored, context, free)

    def speed(batch: int) -> float:
        return roofline.decode_tokens_per_second(
            record["bandwidth_bytes_per_second"],
            changed.read_bytes(batch, weight_size),
            roofline.sequence_bytes(read, context),
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
        "cache_bytes_per_token": sum(size for size, _ in stored),
        "cache_bytes_at_context": roofline.sequence_bytes(stored, context),
        "longest_context": roofline.longest_context(stored, free),
        "users": users,
        "tokens_per_second_1_user": speed(1) if users else None,
        "tokens_per_second_most_users": speed(users) if users else None,
    }


def _context(given: int | None, model: Model) -> int:
    """Returns the tokens of a user: --context, or what the model was made for, up to a limit."""
    if given is None and model.max_length is None:
        raise UserError(
            "the file has no key 'max_position_embeddings': give --context=TOKENS instead"
        )
    if given and model.learned_positions and given > model.max_length:
        raise UserError(
            f"--context={given} is more than the {model.max_length} learned positions of the"
            " model: give fewer tokens"
        )
    return given or min(model.max_length, LONGEST_DEFAULT_CONTEXT)


def _heading(
    values: flags.FlagValues,
    given: Mapping[str, bool],
    device: str,
    model: Model,
    record: dict,
) -> list[str]:
    """Returns the lines above the table; the first one says where figures are estimates."""
    about = "" if model.exact else ABOUT
    specs = [layer.attention for layer in model.layers]
    weights = record["weight_bytes"]
    memory = record["memory_bytes"]
    active = ""
    if record["active_params"] != record["num_params"]:
        active = f"; {about}{record['active_params']:,} of them active for a token"
    left = f"{about}{formats.num_bytes(memory - weights)} left for the cache"
    if weights >= memory:
        left = "too small for the weights: nothing fits"
    default = {name: "" if given[name] else f", {device}" for name in ("memory", "bandwidth")}
    made_for = f" (the model was made for {model.max_length:,})" if model.max_length else ""
    model_type = model.model_type or "no model_type"
    shape = f"{len(specs)} layers of width {specs[0].d_model:,}, {_heads(specs)}"
    pairs = [("model", f"{model_type}, {shape}")]
    if model.part:
        pairs.append(("counted", model.part))
    pairs += [
        ("parameters", f"{about}{record['num_params']:,}{active}"),
        ("weights", f"{about}{formats.num_bytes(weights)} {_width(record, model)}"),
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
    """Returns "in bfloat16", or the widths in which the file stores its weights."""
    stored = model.quantization
    if stored is None or record["weight_dtype"] != stored.method:
        return f"in {record['weight_dtype']}"
    part = "experts" if stored.only_experts else "matrices"
    return (
        f"as the file stores them: {stored.method}, {stored.bits:.4g} bits for each number of the"
        f" {part}, scales included, and 16 bits for the rest"
    )


def _heads(specs: list) -> str:
    if not isinstance(specs[0], LatentSpec):
        return sharings.describe_heads(specs)
    spec = specs[0]
    return (
        f"{spec.num_heads} query heads over one latent of {spec.kv_rank} + {spec.rope_dim} numbers"
    )


def _cells(row: dict, model: Model) -> list[str]:
    """Returns the texts of a row, under _HEADER."""
    longest = row["longest_context"]
    cache_saved = formats.NONE
    params_saved = formats.NONE
    if not row["as_is"]:
        cache_saved = formats.saved(row["cache_saved"])
        params_saved = formats.signed(formats.count(row["params_saved"]))
    figures = [
        formats.num_bytes(row["cache_bytes_per_token"]),
        formats.num_bytes(row["cache_bytes_at_context"]),
        cache_saved,
        params_saved,
        "any" if longest is None else formats.count(longest),
        f"{row['users']:,}",
        _speed(row["tokens_per_second_1_user"]),
        _speed(row["tokens_per_second_most_users"]),
    ]
    if not model.exact:
        figures = [cell if cell == formats.NONE else ABOUT + cell for cell in figures]
    return [row["name"], sharings.heads_cell(row), *figures]


def _speed(tokens_per_second: float | None) -> str:
    if tokens_per_second is None:
        return formats.NONE
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 10 else f"{tokens_per_second:.2g}"


def _notes(values: flags.FlagValues, model: Model, record: dict) -> list[str]:
    """Returns sentences about missing rows and about what the figures mean."""
    specs = tuple(layer.attention for layer in model.layers)
    latent = isinstance(specs[0], LatentSpec)
    notes = _latent_notes(specs[0]) if latent else sharings.head_notes(specs)
    if windowed := [s.window for s in specs if s.window is not None]:
        notes.append(
            f"{len(windowed)} of {len(specs)} layers keep at most their window of"
            f" {windowed[0]:,} tokens. The cache a user, the longest context and the users count"
            " that; the cache a token is that of all layers."
        )
    if borrowed := sum(layer.reuses_cache for layer in model.layers):
        notes.append(f"{borrowed} layers read the cache of an earlier layer and have none.")
    if shared := sum(s.shares_kv for s in specs):
        notes.append(
            f"{shared} of {len(specs)} layers have one projection for K and V. Today's engines"
            " store both, which is the first row. The second row stores one tensor in these layers,"
            " with the same weights."
        )
    if any(layer.num_experts for layer in model.layers):
        notes.append(
            "A step reads as many experts as uniform routing reaches on average; memory holds the"
            " weights of all experts."
        )
    longest = "Longest context: what memory allows one user"
    if any(row["longest_context"] is None for row in record["rows"]):
        longest += "; “any” means that every layer has a window and all windows fit"
    if model.learned_positions:
        longest += "; positions are learned, so the model itself cannot go beyond them"
    notes.append(f"{longest}.")
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
            f"--weight_dtype replaces the file's width ({stored.method}): all weights are counted"
            f" in {record['weight_dtype']}."
        )
    return notes


def _latent_notes(spec: LatentSpec) -> list[str]:
    notes = [
        "Keys and values of all heads are read from one latent already, so no other sharing has a"
        f" row. For each token a layer caches {spec.kv_rank} numbers of the latent and"
        f" {spec.rope_dim} of the rotary key, not K and V of every head. An engine that writes out"
        " keys and values caches many times as much."
    ]
    if spec.index_dim:
        notes.append(
            f"The indexer caches {spec.index_dim} more numbers for each token and layer. A step"
            f" reads these for all tokens, and the latents of {spec.index_topk:,} tokens."
        )
    return notes


def _sharing_notes(specs: tuple) -> list[str]:
    notes = []
    if any(s.rope for s in specs):
        notes.append(
            "K=V with RoPE saves cache only in an engine that stores the un-rotated state once"
            " (rotary values raw) or rotates the output back. With K and V stored apart it saves"
            " only parameters."
        )
    notes.append(
        "Sharing must be trained in: tying the projections of a finished model without further"
        " training destroys it. Only a run tells what sharing costs in quality: qkvjax study."
    )
    return notes
