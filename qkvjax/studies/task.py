"""One run of a study: its number, its configuration and its identity."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

from qkvjax import config as configs
from qkvjax import sweep
from qkvjax.durations import to_steps
from qkvjax.errors import UserError
from qkvjax.fields import Config
from qkvjax.models.spec import stack_spec
from qkvjax.studies.tuning import COMPARE


class Part(NamedTuple):
    """What a task number stands for: a point of the grid in one setting with one seed.

    Attributes:
      phase: "tune" or "compare" in a tuned study, "" in others.
      label: label of the point.
      point: fields of the point and their values.
      setting: name of the setting; "" if there is only one.
      fields: fields of the setting and their values.
      seed: replaces `config.seed`.
      value: value of the tuned field; None if nothing is tuned or the value is not chosen yet.
    """

    phase: str
    label: str
    point: dict
    setting: str
    fields: dict
    seed: int
    value: object = None


class Task(NamedTuple):
    """One run: a point of the grid in one setting with one seed.

    Attributes:
      number: the K of --point=K.
      name: the label; in a tuned study followed by the value.
      label: name of the variant.
      setting: name of the setting; "" if there is only one.
      overrides: fields that replace those of the base config, first those of the setting.
      seed: replaces `config.seed`.
      config: the resolved configuration.
      identity: hash of the name and of the identity fields that are not at their default; ""
        while the task waits for its tuning. Two labels of one configuration have two identities:
        such an A/A study measures the noise between equal runs.
      phase, value: see `Part`.
    """

    number: int
    name: str
    label: str
    setting: str
    overrides: dict
    seed: int
    config: Config
    identity: str
    phase: str
    value: object

    @property
    def waits(self) -> bool:
        """Whether the best value of the tuned field is not known yet."""
        return not self.identity

    @property
    def folder(self) -> str:
        """Workdir of the run, relative to that of the study."""
        name = sweep.slug(f"{self.name} {self.setting}")
        return f"runs/{name}-s{self.seed}-{self.identity[:8]}"

    @property
    def work(self) -> float:
        """Multiply-adds of the blocks over the whole run: what its duration is estimated from.

        Only ratios between runs of one study mean something: an epoch counts as one step.
        """
        c = self.config
        stack = stack_spec(c.model, c.data.seq_len)
        steps = to_steps(
            c.train.steps,
            "train.steps",
            tokens_per_step=c.data.batch_size * c.data.seq_len,
            steps_per_epoch=1,
        )
        return steps * c.data.batch_size * stack.block_macs(c.data.seq_len)


def make_task(number: int, part: Part, base: dict, locations: Mapping, tuned_field: str) -> Task:
    """Returns the run that a part stands for.

    Args:
      number: of the task.
      part: point, setting, seed and tuned value.
      base: the configuration that all points change, as plain values.
      locations: the fields that locate the data, as they enter the identity.
      tuned_field: the field of `part.value`.

    Raises:
      UserError: the point is not a valid configuration.
    """
    name = part.label
    overrides = _overrides(part)
    if part.value is not None:
        name = sweep.tuned_label(part.label, tuned_field, part.value)
        overrides[tuned_field] = part.value
    config = _configuration(name, overrides, base, part.seed)
    waits = part.phase == COMPARE and part.value is None
    return Task(
        number=number,
        name=name,
        label=part.label,
        setting=part.setting,
        overrides=overrides,
        seed=part.seed,
        config=config,
        identity="" if waits else _identity(name, config, overrides, locations),
        phase=part.phase,
        value=part.value,
    )


def _overrides(part: Part) -> dict:
    """Returns the fields of the setting followed by those of the point."""
    twice = (part.fields.keys() & part.point.keys()) - {"label"}
    if twice:
        raise UserError(
            f"{sorted(twice)[0]} is set in a point and in a setting of the grid: remove it from"
            " one of them"
        )
    both = {**part.fields, **part.point}
    return {field: value for field, value in both.items() if field != "label"}


def _configuration(name: str, overrides: dict, base: dict, seed: int):
    """Returns the base with the overrides and the seed, checked."""
    config = configs.from_dict(base)
    try:
        for field, value in overrides.items():
            if field in config or field.count(".") == 0:
                near = configs.near_field(field)
                raise UserError(
                    f"{field!r} is not a field: write one such as 'model.sharing'{near}"
                )
            configs.set_field(config, field, value)
        config.seed = seed
        return configs.resolve(config)
    except (UserError, TypeError, AttributeError) as error:
        message = f"the grid's point {name!r} is not a valid configuration: {error}"
        raise UserError(message) from None


def _identity(name: str, config, overrides: dict, locations: Mapping) -> str:
    """Returns the hash of the fields that fix a run.

    Fields at their default are left out: a field that is added later does not change the identity
    of old runs. `Study.claim` notices a default that changed, since it compares all fields.
    """
    fixed = configs.identity(config)
    for field in locations.keys() - overrides.keys():
        fixed[field] = locations[field]
    changed = {field: value for field, value in fixed.items() if value != defaults().get(field)}
    return sweep.identity_hash(changed | {"label": name})


@functools.cache
def defaults() -> dict:
    """Returns the identity fields of the default configuration."""
    return configs.identity(configs.resolve(configs.default()))
