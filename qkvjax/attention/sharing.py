"""Sharings: which of the roles q, k, v use one projection, and how that is written.

A sharing is a set partition of {q, k, v}. Its blocks are separated by "-", and the roles of a block
are joined by "=": "q-k=v" has one projection for the query and one for key and value. Reports write
it in upper case: Q-K=V; and QKV for "q-k-v".

Nothing here imports jax.
"""

from __future__ import annotations

import functools
import re

from qkvjax.errors import UserError

SHARINGS = ("q-k-v", "q-k=v", "q=k-v", "q=v-k", "q=k=v")

# Other names of attention variants, and what they mean here; none of them is a sharing.
NOT_SHARINGS = {
    "mha": "three projections are 'q-k-v'",
    "gqa": "grouped queries are model.num_kv_heads, a divisor of model.num_heads",
    "mqa": "one key-value head is model.num_kv_heads=1",
    "+": "the '+' of the paper is a score modifier: model.score=('score2d(10)',)",
}


def sharing_name(sharing: str) -> str:
    """Returns the sharing as reports write it: 'q-k-v' -> 'QKV', 'q-k=v' -> 'Q-K=V'."""
    sharing = canonical_sharing(sharing)
    return "QKV" if sharing == "q-k-v" else str(sharing).upper()


def canonical_sharing(text):
    """Returns one of SHARINGS for it or its name in reports: 'QKV' -> 'q-k-v', 'Q-K=V' -> 'q-k=v'.

    Upper and lower case are the same. Anything else is returned as it is, for `parse_sharing` to
    refuse.
    """
    plain = "".join(str(text).lower().split())
    plain = "q-k-v" if plain == "qkv" else plain
    return plain if plain in SHARINGS else text


@functools.cache
def parse_sharing(sharing: str) -> tuple[tuple[str, ...], ...]:
    """Splits "q-k=v" into blocks of roles: (("q",), ("k", "v")).

    Raises:
      UserError: the string is not a set partition of {q, k, v}, or not in its usual order.
    """
    blocks = tuple(tuple(block.split("=")) for block in str(sharing).split("-"))
    if sharing in SHARINGS:
        return blocks
    listed = ", ".join(SHARINGS)
    roles = sorted(role for block in blocks for role in block)
    if roles == ["k", "q", "v"]:
        usual = _by_partition()[frozenset(map(frozenset, blocks))]
        raise UserError(f"sharing {sharing!r} is written {usual!r} (one of {listed})")
    raise UserError(
        f"sharing {sharing!r} is not a partition of q, k and v: each role stands in it once, joined"
        f" by '=' to the roles it shares a projection with and by '-' to the others; use one of"
        f" {listed}{_suggestion(sharing)}{_other_meaning(sharing)}"
    )


def _by_partition() -> dict[frozenset, str]:
    """Returns the sharings by their set partitions, whose blocks and roles have no order."""
    return {frozenset(map(frozenset, parse_sharing(sharing))): sharing for sharing in SHARINGS}


def _suggestion(text) -> str:
    """Returns "; did you mean ...?" where the text names each role at most once, else "".

    Roles that touch are tied, and roles that are missing are alone: "k=v", "q_k=v" and "q-kv" all
    mean 'q-k=v'.
    """
    lower = str(text).lower()
    has_other_letters = re.search("[a-z]", re.sub("[qkv]", "", lower))
    joined = re.sub(r"[^qkv=]+", "-", re.sub(r"[=()\[\]{}]", "", lower))
    roles = [letter for letter in joined if letter in "qkv"]
    if has_other_letters or len(roles) < 2 or len(set(roles)) < len(roles):
        return ""
    if joined == "qkv":  # the report's name of three projections, and not one of all roles
        blocks = {frozenset(role) for role in "qkv"}
    else:
        blocks = {frozenset(block) for block in joined.split("-") if block}
    blocks |= {frozenset(role) for role in "qkv" if role not in roles}
    return f"; did you mean {_by_partition()[frozenset(blocks)]!r}?"


def _other_meaning(text) -> str:
    """Returns, in brackets, what a word stands for that is not a sharing; "" for others."""
    meanings = [what for word, what in NOT_SHARINGS.items() if word in str(text).lower()]
    return f" ({'; '.join(meanings)})" if meanings else ""
