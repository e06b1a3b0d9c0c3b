"""Reads the `config.json` of a published model as shapes and counts, without weights or jax.

The counts follow the public modelling code of `transformers`. Defaults that a file leaves out come
from `family_table`, and the notes name them. A file of an unknown family is counted like Llama's or
DeepSeek-V3's if it has no keys that these lack, and marked as an estimate. Other files are refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from qkvjax.errors import UserError
from qkvjax.files import read_object
from qkvjax.interop import blocks, quantization, recognise
from qkvjax.interop.families import Family
from qkvjax.interop.family_table import FAMILIES, NESTED_DEFAULTS, SAME
from qkvjax.interop.keys import Keys
from qkvjax.interop.shapes import Layer, Model

# Where files of several parts keep the language model.
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_OTHER_PARTS = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower", "visual")
_HEADS = re.compile(r"(ForCausalLM\w*|LMHeadModel|ForConditionalGeneration|Model)$")
_PART_NOTE = "Counted is the language model; vision and audio towers are not."
REMEDY = (
    "plan counts decoders whose layers all cache keys and values or a latent: give --model the file"
    " of one of those that docs/reference/plan.md lists"
)


def read(path: str | Path) -> Model:
    """Reads a `config.json`, or the one in a folder.

    Raises:
      UserError: the file does not exist or is not a JSON object, a value is missing or impossible,
        or plan cannot count such layers.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} is not a file: --model takes a local config.json or its folder, for example"
            " after `hf download ORG/NAME config.json`"
        )
    return from_values(read_object(path, "download it again"), path)


def from_values(values: Mapping, path: Path = Path("config.json")) -> Model:
    """Returns the model that the content of a `config.json` describes.

    Args:
      values: the parsed file.
      path: of the file, for messages.

    Raises:
      UserError: a value is missing or impossible, or plan cannot count such layers.
    """
    outer = values
    values, where = _language_model(outer)
    has_parts = bool(where) or any(outer.get(name) for name in _OTHER_PARTS)
    architectures = _architectures(outer, values)
    model_type = str(values.get("model_type") or outer.get("model_type") or "")
    model_type, family = _family(model_type, values, architectures)
    if refusal := _refusal(values, outer, architectures, family):
        named = f"model_type {model_type!r}" if model_type else "no model_type"
        raise UserError(f"{path} ({where}{named}) describes {refusal}: {REMEDY}")
    known = family is not None
    if known:
        estimate = _another_class(model_type, family, values, outer, architectures)
    else:
        if outer.get("projection_dim") is not None:
            raise UserError(
                f"{path} describes a model that compares texts with images ('projection_dim') and"
                f" decodes nothing: {REMEDY}"
            )
        family, estimate = _similar_family(model_type, values, str(path), where)
    if family.standard is not None:
        try:
            values = family.standard(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    if where and values.get("vocab_size") is not None:
        nested = NESTED_DEFAULTS.get(SAME.get(model_type, model_type), {})
        family = dataclasses.replace(family, defaults=nested | dict(family.defaults))
    keys = Keys(values, path, family, where, known)
    model = _model(keys, model_type, outer, estimate)
    if not has_parts:
        return model
    return dataclasses.replace(
        model,
        part="the language model alone: vision and audio parts are left out",
        notes=(_PART_NOTE, *model.notes),
    )


def _language_model(values: Mapping) -> tuple[Mapping, str]:
    """Returns the keys of the language model, and where they are: "text_config." or ""."""
    for name in _TEXT_PARTS:
        if isinstance(values.get(name), dict):
            return values[name], f"{name}."
    return values, ""


def _refusal(
    values: Mapping, outer: Mapping, architectures: list[str], family: Family | None
) -> str | None:
    """Returns what the file describes that plan cannot count; None if it can count it.

    Args:
      values: keys of the language model.
      outer: the whole file.
      architectures: class names of the file.
      family: of the file; None if it is unknown.
    """
    refusal = recognise.refusal(values, architectures, family)
    if refusal is None and values is not outer:
        outer_keys = {"is_encoder_decoder": outer.get("is_encoder_decoder")}
        refusal = recognise.refusal(outer_keys, [], None)
    return refusal


def _model(keys: Keys, model_type: str, outer: Mapping, estimate: str | None) -> Model:
    """Returns the model of a file whose family is settled.

    Args:
      keys: of the language model.
      model_type: of the language model.
      outer: the whole file.
      estimate: why the counts are not exact; None if they are.
    """
    family = keys.family
    notes = []
    if estimate is not None:
        notes.append(
            f"{estimate}: every figure is an estimate (≈); compare the parameters with the"
            " published ones before you rely on it."
        )
    tied = _is_tied(keys, outer)
    if tied is None:
        tied = family.tied
        if estimate is not None:
            notes.append("tie_word_embeddings is not in the file: taken as false.")
    stored = quantization.read(keys.values) or quantization.read(outer)
    layers = blocks.layers(keys)
    if stored is not None and stored.bits is not None:
        layers = tuple(
            dataclasses.replace(layer, widths=stored.widths(i)) for i, layer in enumerate(layers)
        )
    outside = _outside(keys, layers, tied)
    if keys.get("num_nextn_predict_layers"):
        notes.append(
            "Layers that predict further tokens (num_nextn_predict_layers) are not counted: they"
            " are a draft model beside this one."
        )
    if keys.defaulted:
        defaults = ", ".join(keys.defaulted)
        notes.append(f"Not in the file, so the defaults of {model_type}: {defaults}.")
    return Model(
        model_type,
        layers,
        **outside,
        notes=tuple(notes),
        estimate=estimate,
        quantization=stored,
        head_bytes=stored.head_bytes() if stored is not None and stored.bits else 2.0,
    )


def _is_tied(keys: Keys, outer: Mapping) -> bool | None:
    """Returns whether the file says that head and embedding are one table; None if it does not."""
    tied = keys.values.get("tie_word_embeddings")
    return outer.get("tie_word_embeddings") if tied is None else tied


def _outside(keys: Keys, layers: tuple[Layer, ...], tied: bool) -> dict:
    """Returns the fields of a `Model` about embeddings, head and last norm.

    Args:
      keys: of the language model.
      layers: every layer.
      tied: whether head and embedding are one table.
    """
    family = keys.family
    vocab = keys.whole("vocab_size")
    d = keys.whole("hidden_size")
    # In OPT-350M alone the embedding is narrower than D, with a map from one to the other.
    embedded = keys.whole("word_embed_proj_dim", d)
    extra_rows = 0 if keys.get("learned_positions") else family.positions
    max_length = None
    if extra_rows is not None or keys.get("max_position_embeddings") is not None:
        max_length = keys.whole("max_position_embeddings")
    head = vocab * embedded
    table = 0 if tied else head
    if extra_rows is not None:
        table += (max_length + extra_rows) * d
    num_norms = keys.flag(family.final_norm) + family.embedding_norm
    other = head + blocks.norm_numbers(keys) * d * num_norms
    macs = head
    if embedded != d:
        other += 2 * embedded * d
        macs += 2 * embedded * d
    if keys.flag(family.head_bias):
        other += vocab
    if width := blocks.per_layer_width(keys):
        table += keys.whole("vocab_size_per_layer_input") * len(layers) * width
        other += d * len(layers) * width + width
        macs += d * len(layers) * width
    return {
        "table_params": table,
        "other_params": other,
        "other_macs": macs,
        "max_length": max_length,
        "learned_positions": extra_rows is not None,
        "head_params": 0 if tied else head,
    }


def _architectures(outer: Mapping, values: Mapping) -> list[str]:
    """Returns the class names of the whole file and of the language model, each once."""
    names = []
    for level in (outer, values):
        classes = level.get("architectures")
        if isinstance(classes, list):
            names += map(str, classes)
    return list(dict.fromkeys(names))


def _family(
    model_type: str, values: Mapping, architectures: list[str]
) -> tuple[str, Family | None]:
    """Returns the name and the entry of a file's family in the table; None if it has no entry.

    A file without a `model_type` is recognised by the name of its class.
    """
    name = SAME.get(model_type, model_type)
    if name in FAMILIES:
        return model_type, FAMILIES[name]
    if not model_type:
        classes = {_class_of(architecture) for architecture in architectures}
        for name, family in FAMILIES.items():
            if _plain(name) in classes:
                return name, family
        # The first files of GPT-2 are older than model_type.
        foreign = ("multi_query", "rotary_dim", "position_embedding_type", "alibi")
        if "n_embd" in values and not any(values.get(key) for key in foreign):
            return "gpt2", FAMILIES["gpt2"]
    return model_type, None


def _similar_family(model_type: str, values: Mapping, path: str, where: str) -> tuple[Family, str]:
    """Returns the family whose layout an unknown file has, and why the counts are an estimate.

    Raises:
      UserError: the layout is neither Llama's nor DeepSeek-V3's.
    """
    latent = recognise.is_latent(values)
    reason = recognise.unlike_llama(values, latent)
    named = "the file has no model_type"
    if model_type:
        named = f"model_type {model_type[:40]!r} is not known to plan"
    part = f"its {where.removesuffix('.')}" if where else "the file"
    if reason is not None:
        raise UserError(
            f"{path}: {named}, and {part} is not laid out like Llama's: {reason}; {REMEDY}"
        )
    family = FAMILIES["deepseek_v3"] if latent else FAMILIES["llama"]
    if latent and not values.get("n_routed_experts"):
        family = dataclasses.replace(family, experts=None)
    family = dataclasses.replace(family, defaults={}, mlp_bias="mlp_bias")
    like = "DeepSeek-V3's" if latent else "Llama's"
    return family, f"{named}: its keys were counted like {like}"


def _another_class(
    model_type: str, family: Family, values: Mapping, outer: Mapping, architectures: list[str]
) -> str | None:
    """Returns why the class of a file may differ from its `model_type`; None if they fit."""
    if values is not outer:
        return None
    expected = {_plain(model_type), *family.classes}
    for name in architectures:
        headless = name.endswith("Model") and not name.endswith("LMHeadModel")
        fits = _class_of(name) in expected and not headless
        if not fits and _plain(name) not in family.classes:
            return f"architectures has {name[:40]}, which is not the decoder of {model_type}"
    return None


def _plain(model_type: str) -> str:
    """Returns a `model_type` as it occurs in class names: "gemma3_text" -> "gemma3"."""
    return re.sub(r"[^a-z0-9]", "", model_type.lower()).removesuffix("text")


def _class_of(architecture: str) -> str:
    """Returns a class name without its head: "GPT2LMHeadModel" -> "gpt2"."""
    return _plain(_HEADS.sub("", architecture))
