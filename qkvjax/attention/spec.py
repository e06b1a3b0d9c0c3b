"""What an attention variant is, what it costs, and which combinations are errors.

Nothing here imports jax, so that `plan` answers in a moment.

Letters: T query positions, S key positions, D model width, N query heads, K key-value
heads, G = N/K, H head width.
"""

from __future__ import annotations

import dataclasses
import functools

from qkvjax.attention.sharing import SHARINGS, canonical_sharing, parse_sharing, sharing_name
from qkvjax.errors import UserError, among

__all__ = [
    "CACHE_LAYOUTS",
    "MODIFIERS",
    "POSITIONS",
    "ROTARY_VALUES",
    "SHARINGS",
    "AttentionSpec",
    "canonical_sharing",
    "itemsize",
    "parse_modifier",
    "parse_sharing",
    "sharing_name",
]
POSITIONS = ("none", "learned", "sincos", "rope")
ROTARY_VALUES = ("raw", "rotated", "unrotated_output")
CACHE_LAYOUTS = ("kv", "shared")
# What may be done to the scores; qkvjax/attention/score.py says how.
MODIFIERS = ("score2d(m)", "score_scale", "column_bias", "role_bias", "role_gain")
_ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def itemsize(dtype) -> int:
    """Returns the bytes of one element of `dtype`, a name or anything with a `name`.

    Raises:
      UserError: the dtype is unknown.
    """
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    if name not in _ITEMSIZE:
        raise UserError(f"dtype {name!r} is unknown: use one of {', '.join(_ITEMSIZE)}")
    return _ITEMSIZE[name]


@functools.cache
def parse_modifier(text: str) -> tuple[str, int]:
    """Splits a score modifier: "score2d(10)" -> ("score2d", 10), "score_scale" -> (..., 0).

    Raises:
      UserError: it is none of MODIFIERS.
    """
    name, bracket, rest = str(text).partition("(")
    number = rest.removesuffix(")")
    if name == "score2d" and number.isdecimal() and rest.endswith(")") and int(number) >= 2:
        return name, int(number)
    if name in MODIFIERS and not bracket:
        return name, 0
    if name == "score2d":
        raise UserError(f"score modifier {text!r}: write score2d(m) with m at least 2")
    raise UserError(f"score modifier {text!r} is unknown: use {among(name, MODIFIERS)}")


def _require(condition, message: str) -> None:
    """Raises UserError where a condition does not hold."""
    if not condition:
        raise UserError(message)


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """One attention layer: its variant, its shapes and its costs.

    Attributes:
      d_model: D, the width of the residual stream.
      num_heads: N.
      num_kv_heads: K; None means N. K < N is GQA, K = 1 is MQA.
      head_dim: H; None means D / N.
      sharing: which roles use one projection: one of SHARINGS. Its name in reports is accepted as
        well, and becomes one of these.
      position: where positions enter; only "rope" acts inside attention.
      rotary_values: what V is when K is rotated and V shares its projection (or Q's):
        "raw" the un-rotated state (Gemma 4, MaxText), "rotated" the rotated one (absolute
        position leaks into V), "unrotated_output" the rotated one with the output rotated
        back (DeepSeek-V4).
      rotary_fraction: the part of H that is rotated, from the front.
      rotary_base: the base of the rotary frequencies.
      qk_norm: RMS norm with a learned gain [H] on queries and keys (Henry et al. 2020);
        roles that share a projection share the gain.
      window: keys a query sees, itself included; None means all.
      causal: whether a query sees only keys at or before its position.
      use_bias: biases on the input and output projections.
      score: modifiers of the scores in order, of MODIFIERS, as ("score2d(10)", "score_scale").
      max_length: positions that column_bias has numbers for and score2d features; other
        layers have no limit.
      implementation: what computes the attention, "auto" or one of `kernels.IMPLEMENTATIONS`; the
        variant is the same.

    Raises:
      UserError: fields that are out of range or do not fit together.
    """

    d_model: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    sharing: str = "q-k-v"
    position: str = "none"
    rotary_values: str = "raw"
    rotary_fraction: float = 1.0
    rotary_base: float = 10_000.0
    qk_norm: bool = False
    window: int | None = None
    causal: bool = True
    use_bias: bool = False
    score: tuple[str, ...] = ()
    max_length: int | None = None
    implementation: str = "auto"

    def __post_init__(self):
        self._fill("sharing", canonical_sharing(self.sharing))
        self._check_heads()
        self._check_variant()
        if self.rope:
            self._check_rotation()
        self._check_score()

    def _fill(self, name: str, value) -> None:
        """Sets a field of this frozen dataclass, while it is made."""
        object.__setattr__(self, name, value)

    def _check_heads(self) -> None:
        for name in ("d_model", "num_heads"):
            value = getattr(self, name)
            _require(value >= 1, f"{name}={value} must be at least 1")
        n = self.num_heads
        if self.num_kv_heads is None:
            self._fill("num_kv_heads", n)
        k = self.num_kv_heads
        _require(
            k >= 1 and n % k == 0,
            f"num_kv_heads={k} does not divide num_heads={n}: choose a divisor of {n}",
        )
        if self.head_dim is None:
            _require(
                self.d_model % n == 0,
                f"num_heads={n} does not divide d_model={self.d_model}:"
                " change one of them or set head_dim",
            )
            self._fill("head_dim", self.d_model // n)
        _require(self.head_dim >= 1, f"head_dim={self.head_dim} must be at least 1")

    def _check_variant(self) -> None:
        for name, choices in (("position", POSITIONS), ("rotary_values", ROTARY_VALUES)):
            value = getattr(self, name)
            unknown = f"{name}={value!r} is unknown: use one of {among(value, choices)}"
            _require(value in choices, unknown)
        n, k = self.num_heads, self.num_kv_heads
        _require(
            len(self.block("q")) == 1 or n == k,
            f"sharing {self.sharing!r} ties the query to {self.block('q')[1:]}, so queries and"
            f" keys need the same heads: num_kv_heads={k} must equal num_heads={n} (or use"
            " sharing 'q-k=v' or 'q-k-v')",
        )
        _require(
            self.window is None or self.window >= 1,
            f"window={self.window} must be at least 1, or unset to see every key",
        )
        _require(
            self.rotary_values == "raw" or (self.rope and len(self.block("v")) > 1),
            f"rotary_values={self.rotary_values!r} needs position='rope' and a V that shares"
            f" the projection of a rotated role (position={self.position!r}, sharing="
            f"{self.sharing!r}): use rotary_values='raw'",
        )

    def _check_rotation(self) -> None:
        _require(
            0 < self.rotary_fraction <= 1,
            f"rotary_fraction={self.rotary_fraction} must be in (0, 1]; for no rotation use"
            " position='none'",
        )
        _require(
            self.rotary_dim % 2 == 0 and self.rotary_dim > 0,
            f"the rotary width is {self.rotary_dim} (head_dim={self.head_dim} x"
            f" rotary_fraction={self.rotary_fraction}) and must be even, because numbers are"
            " rotated in pairs",
        )
        _require(self.rotary_base > 1, f"rotary_base={self.rotary_base} must be above 1")

    def _check_score(self) -> None:
        is_sequence = isinstance(self.score, (list, tuple))
        _require(
            is_sequence and all(isinstance(text, str) for text in self.score),
            f"score={self.score!r} is not a tuple of modifiers: write ('score_scale',)",
        )
        self._fill("score", tuple(self.score))
        names = [name for name, _ in self.modifiers]
        _require(
            len(set(names)) == len(names),
            f"score={self.score} names a modifier twice: two of a kind are one",
        )
        _require(
            self.rope or "role_gain" not in names,
            "score modifier 'role_gain' without position='rope' leaves the scores of tied roles"
            " symmetric and folds into the projections of others: use 'role_bias', or"
            " RoPE",
        )
        _require(
            self.max_length is not None or not self.bounded,
            "score modifiers 'column_bias' and 'score2d' need max_length, the longest sequence",
        )

    # ---- what the variant is ------------------------------------------------------------------

    @property
    def modifiers(self) -> tuple[tuple[str, int], ...]:
        """The score modifiers as (name, m)."""
        return tuple(parse_modifier(text) for text in self.score)

    @property
    def bounded(self) -> bool:
        """Whether the scores are defined up to `max_length` positions only."""
        return bool({"column_bias", "score2d"} & {name for name, _ in self.modifiers})

    @property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """The blocks of roles, one learned projection each."""
        return parse_sharing(self.sharing)

    def block(self, role: str) -> tuple[str, ...]:
        """Returns the block of roles that `role` belongs to."""
        return next(block for block in self.blocks if role in block)

    @property
    def shares_kv(self) -> bool:
        """Whether K and V come from one projection."""
        return self.block("k") == self.block("v")

    @property
    def rope(self) -> bool:
        """Whether queries and keys are rotated."""
        return self.position == "rope"

    @property
    def rotary_dim(self) -> int:
        """How many of the H numbers of a head are rotated."""
        return int(round(self.head_dim * self.rotary_fraction)) if self.rope else 0

    @property
    def modifies_roles(self) -> bool:
        """Whether a score modifier changes queries and keys themselves, head by head."""
        return any(name.startswith("role_") for name, _ in self.modifiers)

    @property
    def values_are_keys(self) -> bool:
        """Whether the very tensor that serves as key is the value (one tile, used twice)."""
        transformed = self.rope or self.qk_norm or self.modifies_roles
        return self.shares_kv and (self.rotary_values != "raw" or not transformed)

    @property
    def queries_are_keys(self) -> bool:
        """Whether queries and keys are one tensor as they enter the scores."""
        return self.block("q") == self.block("k") and not self.score

    def num_role_heads(self, role: str) -> int:
        """Returns N for the query, K for key and value."""
        return self.num_heads if role == "q" else self.num_kv_heads

    @property
    def cache_layout(self) -> str:
        """The smallest layout that holds this variant: "shared" where K = V, else "kv"."""
        return "shared" if self.shares_kv else "kv"

    def check_layout(self, layout: str | None) -> str:
        """Returns the layout to use; None means the smallest one.

        Raises:
          UserError: the layout is unknown or cannot hold this variant.
        """
        layout = layout or self.cache_layout
        if layout not in CACHE_LAYOUTS:
            use = ", ".join(CACHE_LAYOUTS)
            raise UserError(f"cache layout {layout!r} is unknown: use one of {use}")
        if layout == "shared" and not self.shares_kv:
            raise UserError(
                f"cache layout 'shared' stores one tensor for K and V, which sharing"
                f" {self.sharing!r} does not have: use layout 'kv', or sharing 'q-k=v' or 'q=k=v'"
            )
        return layout

    # ---- what it costs: pure functions of the fields ------------------------------------------

    @property
    def num_params(self) -> int:
        """Learned numbers of the layer: projections, output, biases, gains, score modifiers."""
        widths = [self.num_role_heads(block[0]) * self.head_dim for block in self.blocks]
        inner = self.num_heads * self.head_dim
        total = self.d_model * (sum(widths) + inner)
        if self.use_bias:
            total += sum(widths) + self.d_model
        if self.qk_norm:
            total += self.head_dim * len({self.block("q"), self.block("k")})
        return total + sum(self._modifier_params(name, m) for name, m in self.modifiers)

    def _modifier_params(self, name: str, m: int) -> int:
        if name == "score_scale":
            return 1
        if name == "column_bias":
            return self.max_length
        if name == "score2d":
            return m + 1  # the weights of the features, and an offset
        return (self.num_heads + self.num_kv_heads) * self.head_dim  # role_bias, role_gain

    def forward_macs(self, length: int) -> int:
        """Returns the multiply-adds of one sequence of `length` tokens.

        Scores and values count all length^2 pairs, as the paper's profiler does, or the band
        that `window` leaves.
        """
        widths = [self.num_role_heads(block[0]) * self.head_dim for block in self.blocks]
        inner = self.num_heads * self.head_dim
        return length * self.d_model * (sum(widths) + inner) + 2 * self.pairs(length) * inner

    def pairs(self, length: int) -> int:
        """Returns how many pairs of positions `forward_macs` counts."""
        band = length
        if self.window is not None:
            band = min(length, self.window if self.causal else 2 * self.window - 1)
        return length * band

    def cache_slots(self, length: int) -> int:
        """Returns how many tokens of one sequence of `length` a contiguous cache keeps.

        A windowed layer needs no more than its window.
        """
        return length if self.window is None else min(length, self.window)

    def cache_bytes(self, length: int, dtype="bfloat16", layout: str | None = None) -> int:
        """Returns the bytes of a contiguous cache of one sequence of `length` tokens."""
        return self.cache_slots(length) * self.cache_bytes_per_token(dtype, layout)

    def cache_bytes_per_token(self, dtype="bfloat16", layout: str | None = None) -> int:
        """Returns the bytes that the decode cache of this layer has for each token."""
        tensors = 1 if self.check_layout(layout) == "shared" else 2
        size = itemsize(dtype)
        scale = 2 if size == 1 else 0  # int8 has one in bfloat16 for each head
        return tensors * self.num_kv_heads * (self.head_dim * size + scale)

    def decode_arithmetic_intensity(self, dtype="bfloat16", layout: str | None = None) -> float:
        """Returns the FLOPs per cache byte when one query reads the cache (scores and values only).

        4 N H FLOPs over `cache_bytes_per_token`: 2 G / m at 2 bytes a number, where m is the
        number of cached tensors (Zadouri et al. 2025, section 3).
        """
        flops = 4 * self.num_heads * self.head_dim
        return flops / self.cache_bytes_per_token(dtype, layout)
