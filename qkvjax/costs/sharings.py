"""What every sharing of a model costs: the variants of its attention, and a recipe's table.

Nothing here imports jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qkvjax import formats
from qkvjax.attention.spec import SHARINGS, AttentionSpec, parse_sharing, sharing_name

UNITS = "KiB, MiB and GiB are powers of 1024; kB, MB and GB powers of 1000."


class Variant(NamedTuple):
    """One row: a sharing and a number of key-value heads in every layer."""

    sharing: str  # one of SHARINGS, or "as is" where the layers differ
    heads: str  # "as is", "half" or "MQA"
    specs: tuple[AttentionSpec, ...]

    @property
    def num_kv_heads(self) -> int | list[int]:
        """K; a list, in the order of the layers, where they differ."""
        return _one_or_all(spec.num_kv_heads for spec in self.specs)

    @property
    def layout(self) -> str | list[str]:
        """The smallest cache layout that holds the variant; a list where layers differ."""
        return _one_or_all(spec.cache_layout for spec in self.specs)

    @property
    def name(self) -> str:
        """The sharing as tables write it."""
        return self.sharing if self.sharing == "as is" else sharing_name(self.sharing)


def _one_or_all(values: Iterable):
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else distinct


def heads_cell(row: dict) -> str:
    """The key-value heads of a row: "4 (half)"; "16/4 (as is)" where layers differ."""
    heads = row["num_kv_heads"]
    return f"{heads if isinstance(heads, int) else '/'.join(map(str, heads))} ({row['heads']})"


def variants(specs: tuple[AttentionSpec, ...]) -> list[Variant]:
    """Every legal sharing x {the heads as they are, half, one}, the model's own among them."""
    heads = {"as is": [s.num_kv_heads for s in specs]}
    if all(k % 2 == 0 for k in heads["as is"]) and max(heads["as is"]) > 2:
        heads["half"] = [k // 2 for k in heads["as is"]]
    if max(heads["as is"]) > 1:
        heads["MQA"] = [1] * len(specs)
    own = {s.sharing for s in specs}
    found = []
    for label, counts in heads.items():
        sharings = SHARINGS if len(own) == 1 else ("as is", *SHARINGS)
        for sharing in sharings:
            wanted = [s.sharing if sharing == "as is" else sharing for s in specs]
            layers = list(zip(specs, counts, wanted))
            if all(k == s.num_heads or not _ties_query(name) for s, k, name in layers):
                changed = tuple(_changed(s, k, name) for s, k, name in layers)
                found.append(Variant(sharing, label, changed))
    return found


def _ties_query(sharing: str) -> bool:
    return len(parse_sharing(sharing)[0]) > 1


def _changed(spec: AttentionSpec, k: int, sharing: str) -> AttentionSpec:
    # How V is rotated costs nothing and is void where V shares no role; so "raw" for all.
    return dataclasses.replace(spec, num_kv_heads=k, sharing=sharing, rotary_values="raw")


def head_notes(specs: tuple[AttentionSpec, ...]) -> list[str]:
    """Why rows are missing, a sentence each."""
    notes = []
    k = "/".join(map(str, dict.fromkeys(s.num_kv_heads for s in specs)))
    if any(s.num_kv_heads != s.num_heads for s in specs):
        notes.append(
            "No rows for Q=K-V, Q=V-K and Q=K=V: a query tied to K or V needs as many key-value"
            f" heads as query heads, and this model has {k} for {specs[0].num_heads}."
        )
    if any(s.num_kv_heads % 2 and s.num_kv_heads > 1 for s in specs):
        notes.append(f"No rows for half the key-value heads: {k} has no whole half.")
    return notes


def describe_heads(specs: Sequence[AttentionSpec]) -> str:
    """ "32 query and 8 key-value heads of 128", for each kind of layer."""
    kinds = dict.fromkeys((s.num_heads, s.num_kv_heads, s.head_dim) for s in specs)
    return " or ".join(f"{n} query and {k} key-value heads of {h}" for n, k, h in kinds)


def recipe_costs(config) -> tuple[list[str], dict]:
    """The lines to print for --config and the record for plan.json."""
    from qkvjax.data.open import open_dataset, reads_text
    from qkvjax.data.tokenizers import tokenizer_size
    from qkvjax.models.spec import model_spec

    length, shapes = config.data.seq_len, ()
    if reads_text(config):
        num_inputs = tokenizer_size(config.data.tokenizer)
    else:  # only the examples tell their shapes
        data = open_dataset(config)
        num_inputs, shapes = data.num_inputs, (data.num_outputs, data.output)
    model = model_spec(config.model, num_inputs, length, *shapes)
    decodes = model.kind == "lm"
    own, whole_cache = {s.sharing for s in model.layers}, model.cache_bytes_per_token("bfloat16")

    def row(variant: Variant) -> dict:
        spec = dataclasses.replace(model, layers=variant.specs)
        cache = {dtype: spec.cache_bytes_per_token(dtype) for dtype in ("bfloat16", "float32")}
        flops = sum(4 * s.num_heads * s.head_dim for s in variant.specs)
        return {
            "name": variant.name,
            "sharing": variant.sharing,
            "heads": variant.heads,
            "num_kv_heads": variant.num_kv_heads,
            "layout": variant.layout,
            "as_is": variant.heads == "as is" and {variant.sharing} in ({"as is"}, own),
            "num_params": spec.num_params,
            "params_saved": model.num_params - spec.num_params,
            "forward_macs": spec.forward_macs(length),
            "train_flops_per_token": train_flops(spec, length),
            "cache_bytes_per_token": cache["bfloat16"],
            "cache_bytes_per_token_float32": cache["float32"],
            "cache_saved": 1 - cache["bfloat16"] / whole_cache if decodes else None,
            "decode_arithmetic_intensity": flops / cache["bfloat16"] if decodes else None,
        }

    rows = [row(variant) for variant in variants(model.layers)]
    tokens, tokens_text = run_tokens(config)
    record = {
        "num_params": model.num_params,
        "forward_macs": model.forward_macs(length),
        "cache_bytes_per_token": whole_cache,
        "context": length,
        "train_tokens": tokens,
        "train_flops": None if tokens is None else tokens * train_flops(model, length),
        "rows": rows,
    }
    macs, per_token = record["forward_macs"], train_flops(model, length)
    whole = "" if tokens is None else f", {tokens * per_token:.3g} for the run"
    lines = formats.aligned(
        [
            (
                "model",
                f"{model.num_layers} layers of width {model.d_model:,},"
                f" {describe_heads(model.layers)}, {'vocabulary' if decodes else 'inputs'}"
                f" {model.vocab_size:,}",
            ),
            ("parameters", f"{model.num_params:,}"),
            (
                "forward",
                f"{macs:,} multiply-adds for a sequence of {length:,} tokens,"
                f" {macs // length:,} a token",
            ),
            ("training", f"{per_token:.3g} FLOPs a token{whole} ({tokens_text})"),
            (
                "cache",
                f"{formats.num_bytes(whole_cache)} a token in"
                f" bfloat16, {formats.num_bytes(model.cache_bytes_per_token('float32'))} in"
                " float32"
                if decodes
                else "none: nothing is decoded",
            ),
        ]
    )
    header = [
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
    notes = [
        "* is the configured one. FLOPs a token: of training. FLOPs a cache byte: of the scores"
        " and values of one decoded token, over the bfloat16 cache that it reads (arithmetic"
        " intensity). Attention counts all pairs of positions, or the band of a window."
        f" {UNITS}"
    ]
    if any(s.window for s in model.layers):
        notes.append("Windowed layers hold at most their window, however long the sequence.")
    if any(s.shares_kv and s.rope and s.rotary_values == "raw" for s in model.layers):
        notes.append("With RoPE, K=V saves cache because the un-rotated state is what is stored.")
    notes = head_notes(model.layers) + notes
    shown = len(header) if decodes else 6  # without the columns of a cache
    table = formats.table(header[:shown], [_config_cells(one)[:shown] for one in rows])
    return [*lines, "", *table, "", *formats.notes(notes)], record


def train_flops(model, length: int) -> int:
    """FLOPs of training on one token: 2 a multiply-add, and twice the forward pass backwards."""
    return round(6 * model.forward_macs(length) / length)


def run_tokens(config) -> tuple[int | None, str]:
    """Tokens of the whole run, None where they depend on the data, and how to say it."""
    from qkvjax.durations import to_steps

    per_step = config.data.batch_size * config.data.seq_len
    steps = config.train.steps
    if "ep" in str(steps).replace("step", ""):  # epochs: "2ep"
        return None, f"{steps} of data that plan does not read"
    steps = to_steps(steps, "train.steps", tokens_per_step=per_step, steps_per_epoch=0)
    return steps * per_step, f"{steps:,} steps of {per_step:,} tokens"


def _config_cells(one: dict) -> list[str]:
    return [
        one["name"] + (" *" if one["as_is"] else ""),
        heads_cell(one),
        formats.count(one["num_params"]),
        formats.NONE if one["as_is"] else formats.signed(formats.count(one["params_saved"])),
        formats.count(one["forward_macs"]),
        formats.count(one["train_flops_per_token"]),
        formats.num_bytes(one["cache_bytes_per_token"]),
        formats.num_bytes(one["cache_bytes_per_token_float32"]),
        formats.NONE if one["as_is"] else formats.saved(one["cache_saved"]),
        formats.NONE if one["cache_saved"] is None else f"{one['decode_arithmetic_intensity']:.3g}",
    ]
