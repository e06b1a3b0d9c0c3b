"""The fields by name, as help, checks and messages need them."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import NamedTuple

from qkvjax.fields import GROUPS, Config, Evaluator


class Field(NamedTuple):
    """One field.

    Attributes:
      kind: bool, int, float, str or tuple; object for a duration.
      optional: whether it may be unset (None).
      default: its default.
      text: what it is, one line.
      choices: the values that it may have; () where they are not listed.
      low, below: a number is at least the first and below the second; None where it has no range.
      aliases: what other frameworks call it.
    """

    kind: type
    optional: bool
    default: object
    text: str
    choices: tuple[str, ...]
    low: float | None
    below: float
    aliases: tuple[str, ...]

    @property
    def help(self) -> str:
        """One line, with the choices."""
        return f"{self.text}: {', '.join(self.choices)}" if self.choices else self.text


def _fields_of(group: type, prefix: str = "") -> dict[str, Field]:
    """Returns the fields of a group by their names."""
    hints = typing.get_type_hints(group)
    return {
        prefix + field.name: _field(field, hints[field.name])
        for field in dataclasses.fields(group)
        if "help" in field.metadata
    }


def _field(field: dataclasses.Field, hint: object) -> Field:
    """Returns a field of a dataclass as a Field."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(part) or part for part in parts if part is not types.NoneType]
    metadata = dict(field.metadata)
    return Field(
        kind=kinds[0] if len(kinds) == 1 else object,
        optional=types.NoneType in parts,
        default=field.default,
        text=metadata.pop("help"),
        **metadata,
    )


# By dotted name: "seed", "model.sharing", ...
FIELDS: dict[str, Field] = _fields_of(Config)
for _name, _group in GROUPS.items():
    FIELDS |= _fields_of(_group, f"{_name}.")
EVALUATOR_FIELDS: dict[str, Field] = _fields_of(Evaluator)
ALIASES = {alias: name for name, field in FIELDS.items() for alias in field.aliases}
