"""What a kernel does not take, and how that is said."""

from __future__ import annotations

from collections.abc import Iterable


def refusal(q, v, widths: range | tuple[int, ...], dtypes: Iterable[str], **lacking) -> str | None:
    """Why a kernel does not take queries q [B, T, N, H] and values v [B, T, K, H'] (None: the
    keys); None where it does.

    Args:
      widths: of heads that it takes.
      lacking: what it has not, by name, as it was given; None where it is not wanted.
    """
    for width in (q.shape[-1], q.shape[-1] if v is None else v.shape[-1]):
        if width not in widths:
            told = f"one of {', '.join(map(str, widths))}"
            if isinstance(widths, range):
                told = f"a multiple of {widths.step} up to {widths[-1]}"
            return f"its head width is {told}, not {width}"
    if str(q.dtype) not in dtypes:
        return f"its dtype is one of {', '.join(dtypes)}, not {q.dtype}"
    wanted = (name.replace("_", " ") for name, given in lacking.items() if given is not None)
    return next((f"it has no {name}" for name in wanted), None)
