"""Errors that a user can cause and repair."""

from __future__ import annotations

from collections.abc import Collection


class UserError(Exception):
    """Bad input; the message says what is wrong and names the remedy.

    Commands print the message on stderr and exit with `code`. Any other exception is a bug of
    qkvjax and keeps its traceback.

    Attributes:
      code: exit code of the command; 2 unless the caller sets another.
      label: word that the printed message starts with.
      agreed: whether every process of the job raises the error.
    """

    label = "error"
    agreed = False

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def did_you_mean(word: object, choices: Collection[object]) -> str:
    """Returns "; did you mean 'x'?" with the choice that is most similar, "" if none is."""
    import difflib

    similar = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def among(word: object, choices: Collection[str]) -> str:
    """Returns "a, b, c", and the choice that a wrong word is similar to."""
    return ", ".join(choices) + did_you_mean(word, choices)
