"""Errors that a user can cause and repair."""

import json
from pathlib import Path


class UserError(Exception):
    """Bad input, with a message that names the remedy.

    The doors print the message alone on stderr and exit with `code` (2 unless said
    otherwise); any other exception is our bug and keeps its traceback.
    """

    label = "error"  # what the message starts with
    agreed = False  # whether every process of the job raises it

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def did_you_mean(word: str, choices) -> str:
    """Returns "; did you mean 'x'?" or "" when nothing is near."""
    import difflib

    near = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def among(word: str, choices) -> str:
    """ "a, b, c", and which of them the wrong word is near to."""
    return ", ".join(choices) + did_you_mean(word, choices)


def parse_object(text: bytes | str) -> dict | None:
    """The JSON object of a text, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_object(path: Path, remedy: str = "restore it from a copy") -> dict:
    """The JSON object in a file.

    Raises:
      UserError: it cannot be read, or holds something else; `remedy` says what helps.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} cannot be read (there is no such file): check the path, or {remedy}"
        ) from None
    except OSError as error:
        why = f"{path} cannot be read ({error.strerror})"
        raise UserError(f"{why}: check the path, or {remedy}") from None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is no JSON ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object: {remedy}")
    return value
