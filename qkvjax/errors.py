"""Errors that a user can cause and repair."""


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
