"""The keys of a published `config.json`, with the defaults of its family and readable errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qkvjax.errors import UserError
from qkvjax.interop.families import Family

MOST = 10**9
MOST_LAYERS = 10_000


class Keys:
    """Reads the keys of one file in the words of `transformers`, whatever the file calls them.

    Attributes:
      values: the parsed file, or the part of it that describes the language model.
      path: for messages.
      family: its defaults and its names of keys.
      where: "text_config." where the keys stand below that key, for messages.
      known: whether the family is that of the file; an unknown one's keys are nobody's to add.
      defaulted: "key=value" for every key that the file leaves to its family.
    """

    def __init__(self, values: Mapping, path: Path, family: Family, where: str, known: bool = True):
        self.values = values
        self.path = path
        self.family = family
        self.where = where
        self.known = known
        self.defaulted: list[str] = []

    def written(self, name: str) -> str:
        """Returns the name under which the file has `name`, or would have it."""
        names = (*self.family.names.get(name, ()), name)
        return next((one for one in names if self.values.get(one) is not None), names[0])

    def get(self, name: str, default=None):
        """Returns a value: of the file, else of the family, else `default`.

        An explicit null is a value to `transformers` and silences the family's default.
        """
        value = self.values.get(self.written(name))
        if value is None and name in self.family.defaults and not self._is_null(name):
            value = self.family.defaults[name]
            text = f"{name}={value}"
            if value is not None and text not in self.defaulted:
                self.defaulted.append(text)
        return default if value is None else value

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Returns a whole number; raises UserError for a missing or impossible one."""
        value = self.get(name, default)
        shown = f"{self.where}{self.written(name)!r}"
        if value is None and not self.known:
            raise UserError(
                f"{self.path} has no {shown}, without which a model of an unknown family cannot"
                " be counted: give --model the file of a family that docs/reference/plan.md lists"
            )
        if value is None:
            raise UserError(
                f"{self.path} lacks the key {shown}: plan needs it to count; add it"
                " from the model's own configuration"
            )
        if isinstance(value, list):
            raise UserError(
                f"{self.path}: {shown} is a list, so the layers differ in it, and plan does not"
                " count such models: give it a model whose layers have one width"
            )
        most = MOST_LAYERS if name == "num_hidden_layers" else MOST
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UserError(
                f"{self.path}: {shown} is {repr(value)[:40]}, and must be a whole"
                f" number of at least {least} and at most {most:,}"
            )
        return value

    def flag(self, value: bool | str) -> bool:
        """Returns a yes or no of a family: itself, or what the key of that name says."""
        return bool(self.get(value)) if isinstance(value, str) else value

    def listed(self, name: str, length: int | None = None) -> list | None:
        """Returns a list, or None where the file has none.

        Raises:
          UserError: it is something else, or has not `length` entries.
        """
        value = self.get(name)
        if value is None:
            return None
        shown = f"{self.path}: {self.where}{self.written(name)!r}"
        if length is None and not isinstance(value, list):
            raise UserError(f"{shown} must be a list of layers")
        if length is not None and (not isinstance(value, list) or len(value) != length):
            raise UserError(f"{shown} must be a list with an entry for each of the {length} layers")
        return value

    def _is_null(self, name: str) -> bool:
        names = (*self.family.names.get(name, ()), name)
        return any(one in self.values for one in names)
