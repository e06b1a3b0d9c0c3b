"""The configuration: how it is made, read, saved, compared and checked.

A recipe in `configs/` starts from `default()`, a ConfigDict, and changes what it needs; the command
line changes single fields. `resolve` checks the result once and freezes it: everything below the
commands takes a `qkvjax.fields.Config`. It is saved as `config.json`; no command runs Python from a
workdir.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Mapping
from pathlib import Path

import ml_collections
from ml_collections import config_dict

from qkvjax.attention.spec import canonical_sharing
from qkvjax.errors import UserError, among, did_you_mean
from qkvjax.fields import GROUPS, RETIRED, Config, Evaluator
from qkvjax.files import read_object
from qkvjax.schema import ALIASES, EVALUATOR_FIELDS, FIELDS, Field

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
# These too, unless they are at their default: runs of before they existed stay valid.
LATER_IDENTITY = ("train.gradient_dtype", "train.init_from")
DEFAULT_EVALS = {"eval": {"kind": "bits_per_byte", "split": "validation", "max_labels": 200_000}}


# ---- ConfigDicts: what recipes and the command line change --------------------------------------


def default() -> ml_collections.ConfigDict:
    """Returns the configuration that recipes start from: every field, with its default."""
    config = ml_collections.ConfigDict()
    for name, field in FIELDS.items():
        group, _, leaf = name.rpartition(".")
        if group and group not in config:
            config[group] = ml_collections.ConfigDict()
        target = config[group] if group else config
        if field.optional or field.kind is object:
            target[leaf] = config_dict.placeholder(field.kind)
        if field.default is not None:
            target[leaf] = field.default
    config.evals = ml_collections.ConfigDict(DEFAULT_EVALS)
    return config


def parse_arg(arg: str | None, **defaults) -> ml_collections.ConfigDict:
    """Reads the `size=30m,sharing=q-k=v` behind a recipe's colon.

    Each item is split at its first "="; values take the type of their default (None keeps the
    text).

    Raises:
      UserError: an unknown name, or a value of another type.
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
            raise UserError(f"{name}={text!r} is not of type {kind.__name__}") from None
    return ml_collections.ConfigDict(values, convert_dict=False)


def from_dict(values: Mapping) -> ml_collections.ConfigDict:
    """Returns a ConfigDict of saved values; fields that they lack keep their defaults.

    Raises:
      UserError: a field or a value that there is not.
    """
    config = default()
    config.evals = ml_collections.ConfigDict()
    with config.unlocked():
        for name, value in values.items():
            is_group = isinstance(config.get(name), ml_collections.ConfigDict)
            if is_group and not isinstance(value, Mapping):
                raise UserError(f"config.{name}={value!r} is not a group")
            if isinstance(value, Mapping) and name == "study":
                config[name] = _group(name, value)
            elif isinstance(value, Mapping):
                for key, item in value.items():
                    if item is not None or f"{name}.{key}" not in RETIRED:
                        set_field(config, f"{name}.{key}", item)
            else:
                set_field(config, name, value)
    return config


def set_field(config: ml_collections.ConfigDict, name: str, value) -> None:
    """Sets `group.field` of a ConfigDict.

    Raises:
      UserError: there is no such field (near ones are named), or the value is of another type.
    """
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
    if value is None and name in FIELDS and not FIELDS[name].optional:
        raise UserError(f"config.{name} cannot be unset: its default is {FIELDS[name].default!r}")
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
        what = "not a group" if kind == "group" else f"not of type {kind}"
        raise UserError(f"config.{name}={value!r} is {what}") from None


def _group(name: str, values: Mapping) -> ml_collections.ConfigDict:
    try:
        return ml_collections.ConfigDict(values)
    except ValueError as error:  # a key with a dot, say
        raise UserError(f"config.{name}={values!r} is not a group: {error}") from None


def known_field(name: str) -> str | None:
    """Returns the field that a name stands for: its last word is a field's, or another framework's
    word for one. None where there is none."""
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


# ---- frozen configurations ----------------------------------------------------------------------


def resolve(config: ml_collections.ConfigDict) -> Config:
    """Returns a configuration as frozen groups, checked; its study is left out.

    Neither jax nor data are needed.

    Raises:
      UserError: a value out of its range, or values that do not fit together.
    """
    values = plain(config)
    groups = {
        name: group(**{key: _frozen(item) for key, item in values[name].items()})
        for name, group in GROUPS.items()
    }
    evals = {name: _evaluator(name, options) for name, options in values["evals"].items()}
    resolved = Config(seed=values["seed"], evals=types.MappingProxyType(evals), **groups)
    _check(resolved)
    return resolved


def changed(config: Config, **groups: Mapping) -> Config:
    """Returns a configuration with other values, checked: `changed(config, data={"seq_len": 64})`.

    Raises:
      UserError: as `resolve`.
    """
    others = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in groups.items()
    }
    other = dataclasses.replace(config, **others)
    _check(other)
    return other


def load(path: str | Path) -> Config:
    """Reads a `config.json`.

    Raises:
      UserError: it is missing, cannot be read or does not hold a configuration.
    """
    if not Path(path).exists():
        raise UserError(f"{path} is missing: is this the workdir of a training run?")
    values = read_object(Path(path), "restore it from a copy")
    try:
        return resolve(from_dict(values))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def to_dict(config: Config | ml_collections.ConfigDict) -> dict:
    """Returns a configuration as a plain dictionary of JSON values (tuples become lists).

    Sharings are written in one way, also where they were given by their names in reports.
    """
    values = json.loads(json.dumps(plain(config)))
    model = values.get("model")
    if isinstance(model, dict) and "sharing" in model:
        model["sharing"] = canonical_sharing(model["sharing"])
    return values


def plain(value):
    """Returns groups, ConfigDicts and references as dicts and values, at any depth."""
    if isinstance(value, config_dict.FieldReference):
        value = value.get()
    if isinstance(value, Evaluator):
        options = dataclasses.asdict(value) if value.kind != "inside" else {"kind": value.kind}
        return {key: option for key, option in options.items() if option is not None}
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (ml_collections.ConfigDict, Mapping)):
        return {key: plain(item) for key, item in dict(value).items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value


def identity(config: Config) -> dict:
    """Returns the flat fields that fix a run, `{"model.sharing": "q-k=v", ...}`."""
    flat = flatten(to_dict(config))
    later = {name for name in LATER_IDENTITY if flat.get(name) != FIELDS[name].default}
    return {
        name: value
        for name, value in flat.items()
        if name in later or any(name == key or name.startswith(key + ".") for key in IDENTITY)
    }


def flatten(values: Mapping, prefix: str = "") -> dict:
    """Returns nested dictionaries as one, with dotted names."""
    flat = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, name + ".")
        else:
            flat[name] = value
    return flat


def differing(old: Mapping, new: Mapping) -> list[str]:
    """Returns lines "name: old -> new" for the fields whose values differ."""
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names]


# ---- checks -------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    """Raises UserError where a value is out of its range or values do not fit together."""
    from qkvjax.models.spec import stack_spec

    for name, field in FIELDS.items():
        group, _, leaf = name.rpartition(".")
        value = getattr(getattr(config, group) if group else config, leaf)
        _check_value(f"config.{name}", value, field)
    batch_size = config.data.batch_size
    accumulation = config.train.accumulation
    if batch_size % accumulation:
        raise UserError(
            f"train.accumulation={accumulation} does not divide data.batch_size={batch_size}:"
            " choose a divisor"
        )
    if not config.optimizer.learning_rate > 0:
        raise UserError("config.optimizer.learning_rate=0 trains nothing")
    _check_overrides(config.model.layer_overrides)
    stack_spec(config.model, config.data.seq_len)


def _check_value(name: str, value: object, field: Field) -> None:
    """Raises UserError for a value that is none of the choices, or out of its range."""
    if value is None:
        return
    if field.choices and value not in field.choices:
        raise UserError(f"{name}={value!r} is not one of {among(value, field.choices)}")
    if field.low is not None and not field.low <= value < field.below:
        end = "and finite" if field.below == math.inf else f"and below {field.below}"
        raise UserError(f"{name}={value} must be at least {field.low} {end}")


def _evaluator(name: str, options: object) -> Evaluator:
    """Returns an entry of `evals`, checked."""
    name = f"config.evals.{name}"
    # The name is a prefix of metrics and the name of a file.
    if not re.fullmatch(r"config\.evals\.\w[\w-]*", name):
        raise UserError(f"{name} is not a name of an evaluator: use letters, digits, _ and -")
    if not isinstance(options, Mapping):
        listed = ", ".join(EVALUATOR_FIELDS)
        raise UserError(f"{name}={options!r} is not an evaluator: give it the fields {listed}")
    for key, value in options.items():
        if key not in EVALUATOR_FIELDS:
            use = among(key, EVALUATOR_FIELDS)
            raise UserError(f"{name} has no field {key!r}: use {use}")
        _check_value(f"{name}.{key}", value, EVALUATOR_FIELDS[key])
    if options.get("kind") == "inside" and len(options) > 1:
        raise UserError(f"{name} of kind 'inside' has no other field: delete the rest")
    most = options.get("max_labels")
    if most is not None and not isinstance(most, int):
        raise UserError(f"{name}.max_labels={most!r} must be at least 1, or unset to score all")
    return Evaluator(**options)


def _check_overrides(pattern: tuple) -> None:
    """Raises UserError unless `model.layer_overrides` is a tuple of dicts with values of the
    fields' types."""
    if not all(isinstance(layer, Mapping) for layer in pattern):
        raise UserError(
            f"config.model.layer_overrides={list(pattern)!r} is not a tuple of dicts: write one"
            " dict a layer, as in ({'window': 128}, {})"
        )
    scratch = default()
    for layer in pattern:
        for field, value in layer.items():
            if f"model.{field}" in FIELDS:  # the spec refuses others
                set_field(scratch, f"model.{field}", value)
