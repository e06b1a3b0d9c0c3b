"""What a feed-forward layer is and what it costs, without importing jax.

Letters: D model width, F feed-forward width, E experts.
"""

from __future__ import annotations

import dataclasses
import functools

from qkvjax.errors import UserError, among, did_you_mean

ACTIVATIONS = ("swiglu", "gelu", "relu2")
NUMBERS = ("layers", "experts", "top", "balance", "z_loss")


@dataclasses.dataclass(frozen=True)
class FeedForwardSpec:
    """One feed-forward layer, written as in "gelu", "swiglu(up=down)" or
    "swiglu(experts=8,top=2)".

    Attributes:
      activation: "gelu" (two matrices), "swiglu" (three; Shazeer 2020) or "relu2", the square of
        ReLU (two; So et al. 2021).
      tied: one matrix maps up and, transposed, down: "up=down".
      layers: so many layers after each other use one feed-forward.
      experts: E feed-forwards, of which a router chooses for each token; 1 has no router.
      top: how many it chooses; their outputs are weighted by the router's softmax over them.
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
        """Matrices of D x F numbers that a token meets in one feed-forward."""
        return 3 if self.activation == "swiglu" else 2

    def num_params(self, d_model: int, d_ff: int, bias: bool) -> int:
        """Learned numbers of one feed-forward, its router and all experts."""
        matrices = self.num_matrices - self.tied
        one = matrices * d_model * d_ff
        if bias:
            one += (self.num_matrices - 1) * d_ff + d_model
        return self.experts * one + (d_model * self.experts if self.experts > 1 else 0)

    def forward_macs(self, d_model: int, d_ff: int) -> int:
        """Multiply-adds of a token: of the experts that are chosen, and the router."""
        router = d_model * self.experts if self.experts > 1 else 0
        return self.top * self.num_matrices * d_model * d_ff + router


@functools.cache
def parse_feed_forward(text: str) -> FeedForwardSpec:
    """Reads `model.mlp`.

    Raises:
      UserError: it is written in another way, or its values do not fit together.
    """
    name, bracket, rest = str(text).replace(" ", "").partition("(")
    if name not in ACTIVATIONS:
        raise UserError(f"model.mlp={text!r} is unknown: use one of {among(name, ACTIVATIONS)}")
    if bracket and not rest.endswith(")"):
        raise UserError(f"model.mlp={text!r} has no closing bracket")
    given: dict[str, object] = {}
    for item in filter(None, rest.removesuffix(")").split(",")):
        option, _, value = item.partition("=")
        if item == "up=down":
            given["tied"] = True
            continue
        if option not in NUMBERS:
            raise UserError(
                f"model.mlp={text!r}: {item!r} is no option; they are up=down and"
                f" {', '.join(NUMBERS)}, as in 'swiglu(experts=8,top=2)'"
                f"{did_you_mean(option, NUMBERS)}"
            )
        kind = float if option in ("balance", "z_loss") else int
        try:
            given[option] = kind(value)
        except ValueError:
            raise UserError(
                f"model.mlp={text!r}: {option}={value!r} is no {kind.__name__}"
            ) from None
    found = FeedForwardSpec(name, **given)
    if min(found.layers, found.experts, found.top) < 1 or not 0 <= found.balance + found.z_loss:
        raise UserError(f"model.mlp={text!r}: numbers are at least 1, weights of losses at least 0")
    if found.top > found.experts:
        raise UserError(
            f"model.mlp={text!r} chooses top={found.top} of {found.experts} experts: lower top, or"
            " give more experts"
        )
    if found.experts > 1 and (found.tied or found.layers > 1):
        raise UserError(f"model.mlp={text!r}: experts are neither tied nor shared by layers")
    return found
