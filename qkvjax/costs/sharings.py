"""What every sharing of a model costs: the variants of its attention, and the table of a recipe.

Nothing here imports jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qkvjax import formats
from qkvjax.attention.spec import SHARINGS, AttentionSpec, parse_sharing, sharing_name

UNITS = "KiB, MiB and GiB are powers of 1024; kB, MB and GB powers of 1000."
_HEADER = [
    ("", "sharing"),
    ("", "KV heads"),
    ("", "parameters"),
    ("parameters", "saved"),
    ("mult-adds", "a sequence"),
    ("FLOPs a", "token"),
    ("cache a", "token"),
    ("in", "float32"),
    ("", "saved"),
    ("FLOPs a", "cache byte"),
]
_COLUMNS_WITHOUT_CACHE = 6  # of a model that does not decode


class Variant(NamedTuple):
    """A sharing and a number of key-value heads, in every layer of a model.

    Attributes:
      sharing: one of SHARINGS, or "as is" for layers that differ in their sharing.
      heads: "as is", "half" or "MQA".
      specs: the layers with this sharing and these heads.
    """

    sharing: str
    heads: str
    specs: tuple[AttentionSpec, ...]

    @property
    def num_kv_heads(self) -> int | list[int]:
        """K; a list, in the order of the layers, where they differ."""
        return _one_or_all(spec.num_kv_heads for spec in self.specs)

    @property
    def layout(self) -> str | list[str]:
        """The smallest cache layout for the variant; a list where layers differ."""
        return _one_or_all(spec.cache_layout for spec in self.specs)

    @property
    def name(self) -> str:
        """The sharing as tables write it."""
        return self.sharing if self.sharing == "as is" else sharing_name(self.sharing)


def _one_or_all(values: Iterable):
    """Returns the only distinct value, or a list of the distinct ones."""
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else distinct


def heads_cell(row: dict) -> str:
    """Returns the key-value heads of a row: "4 (half)"; "16/4 (as is)" where layers differ."""
    heads = row["num_kv_heads"]
    text = str(heads) if isinstance(heads, int) else "/".join(map(str, heads))
    return f"{text} ({row['heads']})"


def variants(specs: tuple[AttentionSpec, ...]) -> list[Variant]:
    """Returns every valid sharing with {the model's heads, half of them, one}.

    Where the layers differ in their sharing, the model itself comes first, as "as is".
    """
    model_heads = [spec.num_kv_heads for spec in specs]
    choices = {"as is": model_heads}
    if max(model_heads) > 2 and all(heads % 2 == 0 for heads in model_heads):
        choices["half"] = [heads // 2 for heads in model_heads]
    if max(model_heads) > 1:
        choices["MQA"] = [1] * len(specs)
    sharings = SHARINGS
    if len({spec.sharing for spec in specs}) > 1:
        sharings = ("as is", *SHARINGS)
    result = []
    for label, kv_heads in choices.items():
        for sharing in sharings:
            layers = [
                (spec, heads, spec.sharing if sharing == "as is" else sharing)
                for spec, heads in zip(specs, kv_heads)
            ]
            if all(_is_valid(*layer) for layer in layers):
                changed = tuple(_changed(*layer) for layer in layers)
                result.append(Variant(sharing, label, changed))
    return result


def _is_valid(spec: AttentionSpec, kv_heads: int, sharing: str) -> bool:
    """Tells whether a layer can have a sharing: a tied query needs a key-value head of its own."""
    query_is_tied = len(parse_sharing(sharing)[0]) > 1
    return kv_heads == spec.num_heads or not query_is_tied


def _changed(spec: AttentionSpec, kv_heads: int, sharing: str) -> AttentionSpec:
    # How V is rotated does not change any cost, and not every sharing allows every way: use "raw".
    return dataclasses.replace(spec, num_kv_heads=kv_heads, sharing=sharing, rotary_values="raw")


def head_notes(specs: tuple[AttentionSpec, ...]) -> list[str]:
    """Returns a sentence for each kind of row that the heads of a model rule out."""
    notes = []
    kv_heads = "/".join(map(str, dict.fromkeys(s.num_kv_heads for s in specs)))
    if any(s.num_kv_heads != s.num_heads for s in specs):
        notes.append(
            "No rows for Q=K-V, Q=V-K and Q=K=V: a query tied to K or V needs as many key-value"
            f" heads as query heads, and this model has {kv_heads} for {specs[0].num_heads}."
        )
    if any(s.num_kv_heads % 2 and s.num_kv_heads > 1 for s in specs):
        notes.append(f"No rows for half the key-value heads: {kv_heads} cannot be halved.")
    return notes


def describe_heads(specs: Sequence[AttentionSpec]) -> str:
    """Returns "32 query and 8 key-value heads of 128", for each kind of layer."""
    kinds = dict.fromkeys((s.num_heads, s.num_kv_heads, s.head_dim) for s in specs)
    return " or ".join(
        f"{heads} query and {kv_heads} key-value heads of {head_dim}"
        for heads, kv_heads, head_dim in kinds
    )


def recipe_costs(config) -> tuple[list[str], dict]:
    """Returns the lines to print for --config and the record for plan.json.

    Raises:
      UserError: the config is invalid.
    """
    model = _planned_model(config)
    length = config.data.seq_len
    decodes = model.kind == "lm"
    rows = [_row(model, variant, length) for variant in variants(model.layers)]
    tokens, _ = run_tokens(config)
    record = {
        "num_params": model.num_params,
        "forward_macs": model.forward_macs(length),
        "cache_bytes_per_token": model.cache_bytes_per_token("bfloat16"),
        "context": length,
        "train_tokens": tokens,
        "train_flops": None if tokens is None else tokens * train_flops(model, length),
        "rows": rows,
    }
    columns = len(_HEADER) if decodes else _COLUMNS_WITHOUT_CACHE
    lines = formats.aligned(_summary(config, model))
    table = formats.table(_HEADER[:columns], [_cells(row)[:columns] for row in rows])
    return [*lines, "", *table, "", *formats.notes(_notes(model))], record


def _planned_model(config):
    """Returns the spec of a config's model."""
    from qkvjax.data.open import open_dataset, reads_text
    from qkvjax.data.tokenizers import tokenizer_size
    from qkvjax.models.spec import model_spec

    if reads_text(config):
        num_inputs = tokenizer_size(config.data.tokenizer)
        return model_spec(config.model, num_inputs, config.data.seq_len)
    data = open_dataset(config)  # what is not text is known only from the examples
    shapes = (data.num_outputs, data.output)
    return model_spec(config.model, data.num_inputs, config.data.seq_len, *shapes)


def _row(model, variant: Variant, length: int) -> dict:
    """Returns what a variant of a model costs."""
    spec = dataclasses.replace(model, layers=variant.specs)
    decodes = model.kind == "lm"
    cache_bytes = spec.cache_bytes_per_token("bfloat16")
    decode_flops = sum(4 * layer.num_heads * layer.head_dim for layer in variant.specs)
    model_sharings = {layer.sharing for layer in model.layers}
    has_model_sharing = variant.sharing == "as is" or model_sharings == {variant.sharing}
    cache_saved = None
    intensity = None
    if decodes:
        cache_saved = 1 - cache_bytes / model.cache_bytes_per_token("bfloat16")
        intensity = decode_flops / cache_bytes
    return {
        "name": variant.name,
        "sharing": variant.sharing,
        "heads": variant.heads,
        "num_kv_heads": variant.num_kv_heads,
        "layout": variant.layout,
        "as_is": variant.heads == "as is" and has_model_sharing,
        "num_params": spec.num_params,
        "params_saved": model.num_params - spec.num_params,
        "forward_macs": spec.forward_macs(length),
        "train_flops_per_token": train_flops(spec, length),
        "cache_bytes_per_token": cache_bytes,
        "cache_bytes_per_token_float32": spec.cache_bytes_per_token("float32"),
        "cache_saved": cache_saved,
        "decode_arithmetic_intensity": intensity,
    }


def _summary(config, model) -> list[tuple[str, str]]:
    """Returns (label, text) of the lines above the table."""
    length = config.data.seq_len
    decodes = model.kind == "lm"
    inputs = "vocabulary" if decodes else "inputs"
    macs = model.forward_macs(length)
    flops = train_flops(model, length)
    tokens, duration = run_tokens(config)
    total = "" if tokens is None else f", {tokens * flops:.3g} for the run"
    cache = "none: nothing is decoded"
    if decodes:
        bfloat16 = formats.num_bytes(model.cache_bytes_per_token("bfloat16"))
        float32 = formats.num_bytes(model.cache_bytes_per_token("float32"))
        cache = f"{bfloat16} a token in bfloat16, {float32} in float32"
    return [
        (
            "model",
            f"{model.num_layers} layers of width {model.d_model:,},"
            f" {describe_heads(model.layers)}, {inputs} {model.vocab_size:,}",
        ),
        ("parameters", f"{model.num_params:,}"),
        (
            "forward",
            f"{macs:,} multiply-adds for a sequence of {length:,} tokens, {macs // length:,} a"
            " token",
        ),
        ("training", f"{flops:.3g} FLOPs a token{total} ({duration})"),
        ("cache", cache),
    ]


def _cells(row: dict) -> list[str]:
    """Returns the texts of a row, under _HEADER."""
    params_saved = formats.NONE
    cache_saved = formats.NONE
    if not row["as_is"]:
        params_saved = formats.signed(formats.count(row["params_saved"]))
        cache_saved = formats.saved(row["cache_saved"])
    intensity = row["decode_arithmetic_intensity"]
    return [
        row["name"] + (" *" if row["as_is"] else ""),
        heads_cell(row),
        formats.count(row["num_params"]),
        params_saved,
        formats.count(row["forward_macs"]),
        formats.count(row["train_flops_per_token"]),
        formats.num_bytes(row["cache_bytes_per_token"]),
        formats.num_bytes(row["cache_bytes_per_token_float32"]),
        cache_saved,
        formats.NONE if intensity is None else f"{intensity:.3g}",
    ]


def _notes(model) -> list[str]:
    """Returns sentences about missing rows and about what the figures mean."""
    notes = head_notes(model.layers)
    notes.append(
        "* is the configured one. FLOPs a token: of training. FLOPs a cache byte: of the scores and"
        " values of one decoded token, over the bfloat16 cache that it reads (arithmetic"
        " intensity). Attention counts all pairs of positions, or the band of a window."
        f" {UNITS}"
    )
    if any(layer.window for layer in model.layers):
        notes.append("Layers with a window keep at most their window, however long the sequence.")
    if any(
        layer.shares_kv and layer.rope and layer.rotary_values == "raw" for layer in model.layers
    ):
        notes.append("With RoPE, K=V saves cache because the un-rotated state is what is stored.")
    return notes


def train_flops(model, length: int) -> int:
    """Returns the FLOPs of training on one token: two for each multiply-add of the forward pass,
    and twice as many for the backward pass."""
    return round(6 * model.forward_macs(length) / length)


def run_tokens(config) -> tuple[int | None, str]:
    """Returns (tokens of the whole run, a text about them); None where they depend on the data."""
    from qkvjax.durations import to_steps

    per_step = config.data.batch_size * config.data.seq_len
    steps = config.train.steps
    if "ep" in str(steps).replace("step", ""):  # epochs, such as "2ep"
        return None, f"{steps} of data that plan does not read"
    steps = to_steps(steps, "train.steps", tokens_per_step=per_step, steps_per_epoch=0)
    return steps * per_step, f"{steps:,} steps of {per_step:,} tokens"
