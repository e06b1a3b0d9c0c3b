"""What a feed-forward layer is and what it costs, without importing jax.

Letters: D model width, F feed-forward width, E experts.
"""

from __future__ import annotations

import dataclasses
import functools

from qkvjax.errors import UserError, among, did_you_mean

ACTIVATIONS = ("swiglu", "gelu", "relu2")
# Options that are written NAME=NUMBER, and the type of each number.
NUMBERS = {"layers": int, "experts": int, "top": int, "balance": float, "z_loss": float}


@dataclasses.dataclass(frozen=True)
class FeedForwardSpec:
    """One feed-forward layer, written as in "gelu", "swiglu(up=down)" or
    "swiglu(experts=8,top=2)".

    Attributes:
      activation: "gelu" (two matrices), "swiglu" (three; Shazeer 2020) or "relu2", the square of
        ReLU (two; So et al. 2021).
      tied: whether one matrix maps up and, transposed, down; written "up=down".
      layers: number of consecutive layers that use the same feed-forward.
      experts: E feed-forwards, of which a router chooses some for each token; 1 has no router.
      top: number of experts the router chooses; its softmax over them weights their outputs.
      balance: weight of the load-balancing loss (Fedus et al. 2022, equation 4).
      z_loss: weight of the router's mean log(Z)^2 (Zoph et al. 2022, equation 5).
    """

    activation: str
    tied: bool = False
    layers: int = 1
    experts: int = 1
    top: int = 1
    balance: float = 0.01
    z_loss: float = 0.001

    @property
    def num_matrices(self) -> int:
        """Products with D x F matrices that a token takes part in, in one feed-forward."""
        return 3 if self.activation == "swiglu" else 2

    def num_params(self, d_model: int, d_ff: int, bias: bool) -> int:
        """Returns the learned numbers of one feed-forward: its router and all its experts."""
        matrices = self.num_matrices - self.tied
        expert = matrices * d_model * d_ff
        if bias:
            expert += (self.num_matrices - 1) * d_ff + d_model
        return self.experts * expert + self._router_size(d_model)

    def forward_macs(self, d_model: int, d_ff: int) -> int:
        """Returns the multiply-adds of a token: of the experts chosen for it, and the router."""
        return self.top * self.num_matrices * d_model * d_ff + self._router_size(d_model)

    def _router_size(self, d_model: int) -> int:
        """Returns D E, the numbers of the router's matrix; 0 without a router."""
        return d_model * self.experts if self.experts > 1 else 0


@functools.cache
def parse_feed_forward(text: str) -> FeedForwardSpec:
    """Reads `model.mlp`.

    Raises:
      UserError: the text is not understood, or its values do not fit together.
    """
    name, bracket, rest = str(text).replace(" ", "").partition("(")
    if name not in ACTIVATIONS:
        raise UserError(f"model.mlp={text!r} is unknown: use one of {among(name, ACTIVATIONS)}")
    if bracket and not rest.endswith(")"):
        raise UserError(f"model.mlp={text!r} has no closing bracket")
    options: dict[str, object] = {}
    for item in filter(None, rest.removesuffix(")").split(",")):
        option, value = _parse_option(item, text)
        options[option] = value
    spec = FeedForwardSpec(name, **options)
    _check(spec, text)
    return spec


def _parse_option(item: str, text: str) -> tuple[str, object]:
    """Returns the field of FeedForwardSpec and the value that `item` of the text `text` sets."""
    if item == "up=down":
        return "tied", True
    option, _, value = item.partition("=")
    if option not in NUMBERS:
        raise UserError(
            f"model.mlp={text!r}: {item!r} is not an option; the options are up=down and"
            f" {', '.join(NUMBERS)}, as in 'swiglu(experts=8,top=2)'"
            f"{did_you_mean(option, NUMBERS)}"
        )
    number = NUMBERS[option]
    try:
        return option, number(value)
    except ValueError:
        raise UserError(
            f"model.mlp={text!r}: {option}={value!r} is not a number of type {number.__name__}"
        ) from None


def _check(spec: FeedForwardSpec, text: str) -> None:
    """Raises UserError where values are out of range or do not fit together."""
    counts_are_valid = min(spec.layers, spec.experts, spec.top) >= 1
    weights_are_valid = spec.balance >= 0 and spec.z_loss >= 0  # nan is not valid either
    if not counts_are_valid or not weights_are_valid:
        raise UserError(
            f"model.mlp={text!r}: layers, experts and top must be at least 1, balance and z_loss"
            " at least 0"
        )
    if spec.top > spec.experts:
        raise UserError(
            f"model.mlp={text!r} chooses top={spec.top} of {spec.experts} experts: lower top, or"
            " raise experts"
        )
    if spec.experts > 1 and (spec.tied or spec.layers > 1):
        raise UserError(
            f"model.mlp={text!r}: experts cannot be combined with up=down or with layers: leave"
            " one of them out"
        )
