"""The configuration: what its fields mean, how it is read, saved and checked.

A recipe in `configs/` starts from `default()` and changes what it needs. The resolved
configuration is a plain dictionary, saved as `config.json`; no door runs Python from a
workdir.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import ml_collections
from ml_collections import config_dict

from qkvjax.attention.spec import canonical_sharing
from qkvjax.errors import UserError, among, did_you_mean
from qkvjax.fields import ALIASES, DURATIONS, FIELDS, MOST_STEPS, RANGES, RETIRED
from qkvjax.files import read_object
from qkvjax.kernels import IMPLEMENTATIONS

# What fixes a run: a workdir with other values is refused.
IDENTITY = (
    "seed",
    "model",
    "data",
    "optimizer",
    "train.steps",
    "train.accumulation",
    "train.compute_dtype",
    "train.param_dtype",
)
# These too where they are not at their default, so that runs of before they were there stay valid.
LATER_IDENTITY = ("train.gradient_dtype", "train.init_from")
DEFAULT_EVALS = {"eval": {"kind": "bits_per_byte", "split": "validation", "max_labels": 200_000}}
EVALUATOR_FIELDS = ("kind", "split", "max_labels")


def default() -> ml_collections.ConfigDict:
    """The configuration that recipes start from: every field, with its default."""
    config = ml_collections.ConfigDict()
    for name, (value, _) in FIELDS.items():
        *groups, leaf = name.split(".")
        group = config
        for key in groups:
            if key not in group:
                group[key] = ml_collections.ConfigDict()
            group = group[key]
        if isinstance(value, config_dict.FieldReference):
            value = config_dict.placeholder(value.get_type())
        group[leaf] = value
    for name, value in DURATIONS.items():
        group, leaf = name.split(".")
        config[group][leaf] = value
    config.evals = ml_collections.ConfigDict(DEFAULT_EVALS)
    return config


def parse_arg(arg: str | None, **defaults) -> ml_collections.ConfigDict:
    """Reads the `size=30m,sharing=q-k=v` behind a recipe's colon.

    Each item is split at its first "="; values take the type of their default (None keeps the
    text). Unknown names raise UserError.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, equals, text = item.partition("=")
        if name not in defaults or not equals:
            field = known_field(name)
            override = f"; --config.{field}=VALUE sets that field" if field else ""
            raise UserError(
                f"the recipe has no argument {name!r}: write NAME=VALUE with one of"
                f" {among(name, defaults)}{override}"
            )
        kind = type(defaults[name])
        if text == "None" and kind is not str:
            continue  # unset, which is its default
        try:
            values[name] = text if kind in (str, type(None)) else kind(text)
            if name == "sharing":
                values[name] = canonical_sharing(text)
        except ValueError:
            raise UserError(f"{name}={text!r} is no {kind.__name__}") from None
    return ml_collections.ConfigDict(values, convert_dict=False)


def to_dict(config) -> dict:
    """The configuration as a plain dictionary of JSON values (tuples become lists).

    Sharings are written in one way, also where they were given by their names in reports.
    """
    values = json.loads(json.dumps(plain(config)))
    model = values.get("model")
    if isinstance(model, dict) and "sharing" in model:
        model["sharing"] = canonical_sharing(model["sharing"])
    return values


def plain(value):
    """ConfigDicts and references as dicts and values, at any depth."""
    if isinstance(value, config_dict.FieldReference):
        value = value.get()
    if isinstance(value, (ml_collections.ConfigDict, Mapping)):
        return {key: plain(item) for key, item in dict(value).items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def from_dict(values: Mapping) -> ml_collections.ConfigDict:
    """A configuration from saved values; fields that they lack keep their defaults."""
    config = default()
    config.evals = ml_collections.ConfigDict()
    with config.unlocked():
        for name, value in values.items():
            is_group = isinstance(config.get(name), ml_collections.ConfigDict)
            if is_group and not isinstance(value, Mapping):
                raise UserError(f"config.{name}={value!r} is no group")
            if isinstance(value, Mapping) and name == "study":
                config[name] = _group(name, value)
            elif isinstance(value, Mapping):
                for key, item in value.items():
                    if item is not None or f"{name}.{key}" not in RETIRED:
                        set_field(config, f"{name}.{key}", item)
            else:
                set_field(config, name, value)
    return config


def changed(config, **groups: Mapping) -> ml_collections.ConfigDict:
    """A copy without its study, with other values: `changed(config, data={"seq_len": 64})`."""
    copy = from_dict(to_dict({key: group for key, group in config.items() if key != "study"}))
    for name, values in groups.items():
        copy[name].update(values)
    return copy


def set_field(config, name: str, value) -> None:
    """Sets `group.field`, with a message that names near fields when there is no such one."""
    group, _, leaf = name.rpartition(".")
    target = config
    for key in filter(None, group.split(".")):
        is_group = isinstance(target, ml_collections.ConfigDict)
        target = target[key] if is_group and key in target else None
    if not isinstance(target, ml_collections.ConfigDict):
        target = None
    open_group = group.split(".")[0] in ("evals", "study")
    if target is None or (leaf not in target and not open_group):
        raise UserError(f"config has no field {name!r}{near_field(name)}")
    needed = name in FIELDS and not isinstance(FIELDS[name][0], config_dict.FieldReference)
    if value is None and needed:
        raise UserError(f"config.{name} cannot be unset: its default is {FIELDS[name][0]!r}")
    if name == "model.sharing":
        value = canonical_sharing(value)
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, Mapping):
        value = _group(name, value)
    try:
        target[leaf] = value
    except TypeError:
        kind = target.get_type(leaf)
        kind = "group" if kind is ml_collections.ConfigDict else kind.__name__
        raise UserError(f"config.{name}={value!r} is no {kind}") from None


def known_field(name: str) -> str | None:
    """The field that a name stands for: its last word is a field's, or another framework's word
    for one."""
    word = name.rpartition(".")[2].lower().replace("-", "_")
    same = [field for field in FIELDS if field.rpartition(".")[2] == word]
    return same[0] if same else ALIASES.get(word)


def near_field(name: str) -> str:
    """Returns "; did you mean 'model.sharing'?" for a name that is not a field, or ""."""
    field = known_field(name)
    if field:
        return f"; did you mean {field!r}?"
    group = name.rpartition(".")[0]
    within = [field for field in FIELDS if group and field.startswith(group + ".")]
    return did_you_mean(name, within) or did_you_mean(name, FIELDS)


def _group(name: str, values: Mapping) -> ml_collections.ConfigDict:
    try:
        return ml_collections.ConfigDict(values)
    except ValueError as error:  # a key with a dot, say
        raise UserError(f"config.{name}={values!r} is no group: {error}") from None


def load(path: str | Path) -> ml_collections.ConfigDict:
    """Reads a `config.json`."""
    if not Path(path).exists():
        raise UserError(f"{path} is missing: is this the workdir of a training run?")
    values = read_object(Path(path), "restore it from a copy")
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def identity(config) -> dict:
    """The flat fields that fix a run, `{"model.sharing": "q-k=v", ...}`."""
    flat = flatten(to_dict(config))
    defaults = flatten(to_dict(default()))
    later = {name for name in LATER_IDENTITY if flat.get(name) != defaults[name]}
    return {
        name: value
        for name, value in flat.items()
        if name in later or any(name == key or name.startswith(key + ".") for key in IDENTITY)
    }


def flatten(values: Mapping, prefix: str = "") -> dict:
    """Nested dictionaries as one, with dotted names."""
    flat = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, name + ".")
        else:
            flat[name] = value
    return flat


def differing(old: Mapping, new: Mapping) -> list[str]:
    """Lines "name: old -> new" for the fields whose values differ."""
    changed = [n for n in sorted(old.keys() | new.keys()) if old.get(n) != new.get(n)]
    return [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in changed]


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def to_steps(
    value, name: str, *, tokens_per_step: int, steps_per_epoch: int, total: int | None = None
) -> int:
    """A duration in steps.

    Args:
      value: steps (an int, or its text), epochs ("2ep"), tokens ("10M tokens") or a part of
        the whole run ("5%").
      name: the field, for messages.
      tokens_per_step: tokens of a batch.
      steps_per_epoch: batches in one pass over the training records.
      total: steps of the whole run; None where "%" makes no sense.

    Returns:
      At least 1, or 0 where the value is 0.
    """
    text = str(value).strip().lower().replace("_", "")
    match = re.fullmatch(r"([0-9.]+)\s*([kmb]?)\s*(ep|epochs?|tokens?|steps?|%)?", text)
    remedy = f'{name}={value!r} is no duration: write steps (300), "2ep", "10M tokens" or "5%"'
    if not match or value is None:
        raise UserError(remedy)
    try:
        number = float(match[1]) * _UNITS[match[2]]
    except ValueError:
        raise UserError(remedy) from None
    unit = match[3] or "steps"
    if unit == "%":
        if total is None:
            raise UserError(f"{name}={value!r} is a part of itself: give steps, epochs or tokens")
        steps = number / 100 * total
    elif unit.startswith("ep"):
        steps = number * steps_per_epoch
    elif unit.startswith("token"):
        steps = number / tokens_per_step
    else:
        steps = number
    if steps >= MOST_STEPS:
        raise UserError(f"{name}={text[:20]!r} is {steps:.3g} steps: give fewer than 2^31")
    return max(1, round(steps)) if number else 0


def validate(config) -> None:
    """Checks what types alone do not, without importing jax or reading data."""
    from qkvjax.models.spec import model_spec

    def require(condition, message):
        if not condition:
            raise UserError(message)

    def one_of(name, choices):
        group, leaf = name.split(".")
        value = config[group][leaf]
        require(value in choices, f"config.{name}={value!r} is none of {among(value, choices)}")

    data, optimizer, train = config.data, config.optimizer, config.train
    flat = flatten(plain(config))
    for name, (low, high) in RANGES.items():
        value = flat[name]
        end = "and finite" if high == math.inf else f"and below {high}"
        message = f"config.{name}={value} must be at least {low} {end}"
        require(value is None or low <= value < high, message)
    require(
        data.batch_size % train.accumulation == 0,
        f"train.accumulation={train.accumulation} does not divide data.batch_size="
        f"{data.batch_size}: choose a divisor",
    )
    one_of("optimizer.name", ("adamw", "muon"))
    one_of("optimizer.schedule", ("cosine", "wsd", "multistep", "constant"))
    one_of("model.kind", ("lm", "encoder", "vit"))
    one_of("data.augment", ("none", "crop_flip"))
    one_of("optimizer.decay", ("matrices", "all"))
    one_of("train.compute_dtype", ("float32", "bfloat16"))
    one_of("train.param_dtype", ("float32", "bfloat16"))
    one_of("train.gradient_dtype", ("float32", "bfloat16"))
    one_of("train.remat", ("none", "block", "dots"))
    one_of("train.attention", ("auto", *IMPLEMENTATIONS))
    require(optimizer.learning_rate > 0, "config.optimizer.learning_rate=0 trains nothing")
    for name, options in plain(config.evals).items():
        _check_evaluator(f"config.evals.{name}", options)
    _check_overrides(config)
    model_spec(plain(config.model), 256, data.seq_len)


def _check_evaluator(name: str, options) -> None:
    """Raises UserError unless `options` describe an evaluator."""
    # The name is a prefix of metrics and the name of a file.
    if not re.fullmatch(r"config\.evals\.\w[\w-]*", name):
        raise UserError(f"{name} is not a name of an evaluator: use letters, digits, _ and -")
    if not isinstance(options, Mapping):
        fields = ", ".join(EVALUATOR_FIELDS)
        raise UserError(f"{name}={options!r} is no evaluator: give it the fields {fields}")
    for field in options:
        if field not in EVALUATOR_FIELDS:
            use = among(field, EVALUATOR_FIELDS)
            raise UserError(f"{name} has no field {field!r}: use {use}")
    if options.get("kind") == "inside" and len(options) > 1:
        raise UserError(f"{name} of kind 'inside' has no other field: delete the rest")
    choices = {"kind": ("bits_per_byte", "accuracy", "inside"), "split": ("train", "validation")}
    for field, known in choices.items():
        value = options.get(field, known[0])
        if value not in known:
            raise UserError(f"{name}.{field}={value!r} is none of {among(value, known)}")
    most = options.get("max_labels")
    if most is not None and not (isinstance(most, int) and most >= 1):
        raise UserError(f"{name}.max_labels={most!r} must be at least 1, or unset to score all")


def _check_overrides(config) -> None:
    """Raises UserError when `model.layer_overrides` is no tuple of dicts with values of the
    fields' types."""
    pattern = plain(config.model.layer_overrides)
    if not (isinstance(pattern, list) and all(isinstance(layer, dict) for layer in pattern)):
        raise UserError(
            f"config.model.layer_overrides={pattern!r} is no tuple of dicts: write one dict a"
            " layer, as in ({'window': 128}, {})"
        )
    scratch = default()
    for layer in pattern:
        for field, value in layer.items():
            if f"model.{field}" in FIELDS:  # others are the spec's to refuse
                set_field(scratch, f"model.{field}", value)
