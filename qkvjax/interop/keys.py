"""Reads the keys of a published `config.json` with the defaults of its family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qkvjax.errors import UserError
from qkvjax.interop.families import Family

MOST = 10**9
MOST_LAYERS = 10_000


class Keys:
    """The keys of one file under their names in `transformers`, whatever the file calls them.

    Attributes:
      values: the parsed file, or the part of it that describes the language model.
      path: of the file, for messages.
      family: default values and other names of keys.
      where: "text_config." if the keys are below that key, for messages.
      known: whether the family is that of the file, and not one that it only resembles; only then
        do messages advise to add a missing key.
      defaulted: "key=value" for every default that was used.
    """

    def __init__(self, values: Mapping, path: Path, family: Family, where: str, known: bool = True):
        self.values = values
        self.path = path
        self.family = family
        self.where = where
        self.known = known
        self.defaulted: list[str] = []

    def written(self, name: str) -> str:
        """Returns the name that the file has for a standard key; its first name if it has none."""
        names = self._names(name)
        return next((key for key in names if self.values.get(key) is not None), names[0])

    def get(self, name: str, default=None):
        """Returns a value of the file, else of the family, else `default`.

        `transformers` treats an explicit null as a value: the default of the family does not
        replace it.
        """
        value = self.values.get(self.written(name))
        if value is None and name in self.family.defaults and not self._is_null(name):
            value = self.family.defaults[name]
            text = f"{name}={value}"
            if value is not None and text not in self.defaulted:
                self.defaulted.append(text)
        return default if value is None else value

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Returns a whole number.

        Args:
          name: standard name of the key.
          default: used if neither the file nor the family has a value.
          least: the smallest number that is allowed.

        Raises:
          UserError: there is no value, or it is not a whole number in the allowed range.
        """
        value = self.get(name, default)
        key = f"{self.where}{self.written(name)!r}"
        if value is None and not self.known:
            raise UserError(
                f"{self.path} has no {key}, without which a model of an unknown family cannot"
                " be counted: give --model the file of a family that docs/reference/plan.md lists"
            )
        if value is None:
            raise UserError(
                f"{self.path} lacks the key {key}, which plan needs: add it from the model's"
                " original configuration"
            )
        if isinstance(value, list):
            raise UserError(
                f"{self.path}: {key} is a list, so the layers differ, and plan does not count"
                " such models: give it a model whose layers have one width"
            )
        most = MOST_LAYERS if name == "num_hidden_layers" else MOST
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UserError(
                f"{self.path}: {key} is {repr(value)[:40]}, and must be a whole"
                f" number of at least {least} and at most {most:,}"
            )
        return value

    def flag(self, value: bool | str) -> bool:
        """Returns a `bool | str` field of a family as a bool; a string is the key to read."""
        return bool(self.get(value)) if isinstance(value, str) else value

    def listed(self, name: str, length: int | None = None) -> list | None:
        """Returns a list of the file, None if it has none.

        Raises:
          UserError: the value is not a list, or does not have `length` entries.
        """
        value = self.get(name)
        if value is None:
            return None
        key = f"{self.path}: {self.where}{self.written(name)!r}"
        if length is None and not isinstance(value, list):
            raise UserError(f"{key} must be a list of layers")
        if length is not None and (not isinstance(value, list) or len(value) != length):
            raise UserError(f"{key} must be a list with an entry for each of the {length} layers")
        return value

    def _names(self, name: str) -> tuple[str, ...]:
        """Returns the names that a file may have for a standard key, most important first."""
        return (*self.family.names.get(name, ()), name)

    def _is_null(self, name: str) -> bool:
        """Returns whether the file has the key; called for keys without a value, so it is null."""
        return any(key in self.values for key in self._names(name))
