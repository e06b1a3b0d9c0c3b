"""What a kernel does not support, and the words of its refusal."""

from __future__ import annotations

from collections.abc import Iterable


def refusal(
    q, v, widths: range | tuple[int, ...], dtypes: Iterable[str], unsupported: dict | None = None
) -> str | None:
    """Returns why a kernel does not support these arguments; None where it does.

    Args:
      q: queries [B, T, N, H], or anything with their shape and dtype.
      v: values [B, T, K, H'], likewise; None where the keys are the values.
      widths: the head widths that the kernel supports.
      dtypes: names of the dtypes that it supports.
      unsupported: what else it does not support, in words, with the argument that asks for it; an
        argument of None asks for nothing.
    """
    for width in (q.shape[-1], q.shape[-1] if v is None else v.shape[-1]):
        if width not in widths:
            supported = f"one of {', '.join(map(str, widths))}"
            if isinstance(widths, range):
                supported = f"a multiple of {widths.step} up to {widths[-1]}"
            return f"the head width must be {supported}, not {width}"
    if str(q.dtype) not in dtypes:
        return f"the dtype must be one of {', '.join(dtypes)}, not {q.dtype}"
    for description, argument in (unsupported or {}).items():
        if argument is not None:
            return f"it does not support {description}"
    return None
