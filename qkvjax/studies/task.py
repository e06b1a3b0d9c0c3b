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
    """What the number of a task stands for: a point of the grid in one setting with one seed.

    Attributes:
      phase: "tune" or "compare" in a tuned study, "" in others.
      label: the point's.
      point: its fields.
      setting: the setting's name; "" where there is only one.
      fields: of the setting.
      seed: replaces `config.seed`.
      value: of the tuned field; None where nothing is tuned, and before it is chosen.
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
      number: what --point takes.
      name: the label, in a tuned study with the value behind it.
      label: the variant's name.
      setting: the setting's name; "" where there is only one.
      overrides: the fields that differ from the base, the setting's first.
      seed: replaces `config.seed`.
      config: the resolved configuration.
      identity: hash of the name and of the fields that fix the run and are not at their
        default; "" while the run waits for its tuning. Two labels may stand for the same run: what
        both measure is the noise between equals.
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
        """Whether the value that it is compared at is not known yet."""
        return not self.identity

    @property
    def folder(self) -> str:
        """The run's workdir, relative to the study's."""
        name = sweep.slug(f"{self.name} {self.setting}")
        return f"runs/{name}-s{self.seed}-{self.identity[:8]}"

    @property
    def work(self) -> float:
        """How long a run should take, in multiply-adds of its model's blocks: what runs of one
        study compare by. An epoch counts as one step.
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
      base: the configuration of all points, as plain values.
      locations: where the data lie, as it enters the identity.
      tuned_field: the field of `part.value`.

    Raises:
      UserError: the point is not a legal configuration.
    """
    name, overrides = part.label, _overrides(part)
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
    """The fields of the setting and of the point."""
    twice = (part.fields.keys() & part.point.keys()) - {"label"}
    if twice:
        raise UserError(f"{sorted(twice)[0]} stands in a point and in a setting of the grid")
    both = {**part.fields, **part.point}
    return {field: value for field, value in both.items() if field != "label"}


def _configuration(name: str, overrides: dict, base: dict, seed: int):
    """The base with the overrides and the seed, checked."""
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
        message = f"the grid's point {name!r} is not a legal configuration: {error}"
        raise UserError(message) from None


def _identity(name: str, config, overrides: dict, locations: Mapping) -> str:
    """Hash of what a run is.

    Fields at their default are left out: one that is added later leaves old runs what they are. A
    base whose default has changed is told by `Study.claim`, which compares all of them.
    """
    fixed = configs.identity(config)
    for field in locations.keys() - overrides.keys():
        fixed[field] = locations[field]
    given = {field: value for field, value in fixed.items() if value != defaults().get(field)}
    return sweep.identity_hash(given | {"label": name})


@functools.cache
def defaults() -> dict:
    """The identity of the default configuration."""
    return configs.identity(configs.resolve(configs.default()))
