"""Reads a Hugging Face `config.json` into our words, without weights or jax.

The counts follow the public modelling code of `transformers`; a file may leave out what its
configuration class defaults to, so those defaults stand in `family_table` and are named in the
notes. A file of an unknown family is read like Llama's (or DeepSeek-V3's) and marked as an estimate
where all its keys are theirs; every other file is refused.
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
from qkvjax.interop.shapes import Model

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
    """Reads a `config.json`, or a folder that holds one.

    Raises:
      UserError: no such file, no JSON object, a missing or impossible value, or a model whose
        layers plan cannot count.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} is no file: --model takes a local config.json or the folder that holds it, for"
            " example after `hf download ORG/NAME config.json`"
        )
    return from_values(read_object(path, "download it again"), path)


def from_values(values: Mapping, path: Path = Path("config.json")) -> Model:
    """Returns the model that the parsed `values` describe; `path` is for messages.

    Raises:
      UserError: a missing or impossible value, or a model whose layers plan cannot count.
    """
    outer = values
    where = ""
    for name in _TEXT_PARTS:
        if isinstance(outer.get(name), dict):
            values = outer[name]
            where = f"{name}."
            break
    parted = bool(where) or any(outer.get(name) for name in _OTHER_PARTS)
    architectures = _architectures(outer, values)
    model_type = str(values.get("model_type") or outer.get("model_type") or "")
    model_type, family = _family(model_type, values, architectures)
    refused = recognise.refusal(values, architectures, family)
    if refused is None and values is not outer:
        refused = recognise.refusal(
            {"is_encoder_decoder": outer.get("is_encoder_decoder")}, [], None
        )
    if refused is not None:
        named = f"model_type {model_type!r}" if model_type else "no model_type"
        raise UserError(f"{path} ({where}{named}) describes {refused}: {REMEDY}")
    estimate = None
    known = family is not None
    if family is None:
        if outer.get("projection_dim") is not None:
            raise UserError(
                f"{path} describes a model that compares texts with images ('projection_dim') and"
                f" decodes nothing: {REMEDY}"
            )
        family, estimate = _like_a_known_one(model_type, values, str(path), where)
    elif mismatch := _another_class(model_type, family, values, outer, architectures):
        estimate = mismatch
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
    return dataclasses.replace(
        model,
        part="the language model alone: vision and audio parts are left out" if parted else None,
        notes=((_PART_NOTE,) if parted else ()) + model.notes,
    )


def _model(keys: Keys, model_type: str, outer: Mapping, estimate: str | None) -> Model:
    family = keys.family
    notes = []
    if estimate is not None:
        notes.append(
            f"{estimate}: every figure is an estimate (≈); compare the parameters with the"
            " published ones before you rely on it."
        )
    tied = keys.values.get("tie_word_embeddings")
    if tied is None:
        tied = outer.get("tie_word_embeddings")
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
    vocab = keys.whole("vocab_size")
    d = keys.whole("hidden_size")
    # OPT-350M alone embeds in fewer numbers than D and maps between the two.
    embedded = keys.whole("word_embed_proj_dim", d)
    rows = family.positions
    if keys.get("learned_positions"):
        rows = 0
    max_length = None
    if rows is not None or keys.get("max_position_embeddings") is not None:
        max_length = keys.whole("max_position_embeddings")
    head = vocab * embedded
    table = 0 if tied else head
    if rows is not None:
        table += (max_length + rows) * d
    norm = blocks.norm_numbers(keys) * d
    other = head + norm * (keys.flag(family.final_norm) + family.embedding_norm)
    macs = head
    if embedded != d:
        other += 2 * embedded * d
        macs += 2 * embedded * d
    if keys.flag(family.head_bias):
        other += vocab
    if h := blocks.per_layer_width(keys):
        table += keys.whole("vocab_size_per_layer_input") * len(layers) * h
        other += d * len(layers) * h + h
        macs += d * len(layers) * h
    if keys.get("num_nextn_predict_layers"):
        notes.append(
            "Layers that predict further tokens (num_nextn_predict_layers) are not counted: they"
            " are a draft model beside this one."
        )
    if keys.defaulted:
        named = ", ".join(keys.defaulted)
        notes.append(f"Not in the file, so the defaults of {model_type}: {named}.")
    return Model(
        model_type,
        layers,
        table,
        other,
        macs,
        max_length,
        rows is not None,
        tuple(notes),
        estimate=estimate,
        quantization=stored,
        head_bytes=stored.head_bytes() if stored is not None and stored.bits else 2.0,
        head_params=0 if tied else head,
    )


def _architectures(outer: Mapping, values: Mapping) -> list[str]:
    found = []
    for level in (outer, values):
        named = level.get("architectures")
        found += [str(name) for name in named] if isinstance(named, list) else []
    return list(dict.fromkeys(found))


def _family(
    model_type: str, values: Mapping, architectures: list[str]
) -> tuple[str, Family | None]:
    """Returns the family of the table and its name; a file without a type is known by its class."""
    name = SAME.get(model_type, model_type)
    if name in FAMILIES:
        return model_type, FAMILIES[name]
    if not model_type:
        classes = {_plain(one) for one in FAMILIES} & {_class_of(one) for one in architectures}
        for one in FAMILIES:
            if _plain(one) in classes:
                return one, FAMILIES[one]
        # The first files of GPT-2 are older than model_type.
        foreign = ("multi_query", "rotary_dim", "position_embedding_type", "alibi")
        if "n_embd" in values and not any(values.get(key) for key in foreign):
            return "gpt2", FAMILIES["gpt2"]
    return model_type, None


def _like_a_known_one(
    model_type: str, values: Mapping, path: str, where: str
) -> tuple[Family, str]:
    """Returns the family whose layout an unknown file has, and why the counts are an estimate."""
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
    """Returns why the class of a file may not be that of its `model_type`; None where it is."""
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
    return re.sub(r"[^a-z0-9]", "", model_type.lower()).removesuffix("text")


def _class_of(architecture: str) -> str:
    return _plain(_HEADS.sub("", architecture))
