"""What a whole model is and what it costs, without importing jax.

Letters: T positions, D model width, F feed-forward width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from qkvjax.attention.spec import AttentionSpec
from qkvjax.errors import UserError, did_you_mean

NORMS = ("layernorm", "rmsnorm")
MLPS = ("gelu", "swiglu")
INITS = ("normal", "fan_in")
# Fields of the attention layer that `layer_overrides` may change.
OVERRIDABLE = (
    "sharing", "num_heads", "num_kv_heads", "head_dim", "position", "rotary_values",
    "rotary_fraction", "rotary_base", "qk_norm", "window", "score",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A decoder-only language model: pre-norm blocks of attention and feed-forward.

    Attributes:
      vocab_size: V, rows of the embedding (at least the tokenizer's ids).
      d_model: D.
      layers: one AttentionSpec a layer.
      max_length: rows of the learned position table, and of scores that have a limit.
      position: "none", "learned", "sincos" (added to the embedding) or "rope".
      norm: "layernorm" (gain, and a bias where use_bias) or "rmsnorm".
      mlp: "gelu" (two matrices) or "swiglu" (three).
      d_ff: F.
      dropout: rate on the embedding and on both residual branches, in training.
      use_bias: biases on every linear map and on LayerNorm.
      tie_embeddings: whether the output head is the embedding, transposed.
      init: "normal" is N(0, 0.02^2) everywhere (GPT-2, the paper); "fan_in" is
        N(0, 1/fan_in) with both output projections scaled by 1/sqrt(2 L).
    """

    vocab_size: int
    d_model: int
    layers: tuple[AttentionSpec, ...]
    max_length: int
    position: str = "rope"
    norm: str = "rmsnorm"
    mlp: str = "swiglu"
    d_ff: int = 0
    dropout: float = 0.0
    use_bias: bool = False
    tie_embeddings: bool = True
    init: str = "fan_in"

    def __post_init__(self):
        for name, choices in (("norm", NORMS), ("mlp", MLPS), ("init", INITS)):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"model.{name}={value!r} is unknown: use one of {', '.join(choices)}"
                    f"{did_you_mean(value, choices)}"
                )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout} must be in [0, 1)")
        if self.d_ff < 1:
            raise UserError(f"the feed-forward width is {self.d_ff}: raise model.mlp_ratio")

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def bounded(self) -> bool:
        """Whether sequences end at `max_length`: learned positions, or scores that end there."""
        return self.position == "learned" or any(layer.bounded for layer in self.layers)

    @property
    def period(self) -> int:
        """Length of the repeating pattern of layers; L when nothing repeats.

        The stack is one scan over L / period repetitions of `period` different layers.
        """
        layers = self.layers
        for p in range(1, len(layers)):
            if len(layers) % p == 0 and layers == layers[:p] * (len(layers) // p):
                return p
        return len(layers)

    @property
    def num_params(self) -> int:
        """Learned numbers of the model, exactly."""
        norm = self.d_model * (2 if self.norm == "layernorm" and self.use_bias else 1)
        matrices = 3 if self.mlp == "swiglu" else 2
        mlp = matrices * self.d_model * self.d_ff
        if self.use_bias:
            mlp += (matrices - 1) * self.d_ff + self.d_model
        total = sum(layer.num_params + mlp + 2 * norm for layer in self.layers) + norm
        tables = 1 if self.tie_embeddings else 2
        total += tables * self.vocab_size * self.d_model
        if self.position == "learned":
            total += self.max_length * self.d_model
        return total

    def forward_macs(self, length: int) -> int:
        """Multiply-adds of one sequence: matrix products and attention, no lookups or norms."""
        matrices = 3 if self.mlp == "swiglu" else 2
        mlp = matrices * self.d_model * self.d_ff
        inside = sum(layer.forward_macs(length) + length * mlp for layer in self.layers)
        return inside + length * self.d_model * self.vocab_size

    def cache_bytes_per_token(self, dtype="bfloat16", layout: str | None = None) -> int:
        """Bytes the decode cache holds for each token, over all layers."""
        return sum(layer.cache_bytes_per_token(dtype, layout) for layer in self.layers)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def padded_vocab(tokenizer_size: int) -> int:
    """Embedding rows for a tokenizer: rounded up to 8, or to 128 above 4096 ids.

    50,257 ids of GPT-2 become the 50,304 rows of the paper. Ids without a token are never
    sampled.
    """
    return round_up(tokenizer_size, 128 if tokenizer_size > 4096 else 8)


def model_spec(model: Mapping, tokenizer_size: int, seq_len: int) -> ModelSpec:
    """Builds the spec from the `model` group of a config.

    Args:
      model: the group as a mapping (a plain dict or a ConfigDict).
      tokenizer_size: number of ids of the tokenizer.
      seq_len: length of a training sequence; rows of a learned position table.

    Raises:
      UserError: values that do not fit together.
    """
    if model["kind"] != "lm":
        raise UserError(f"model.kind={model['kind']!r} is unknown: use 'lm'")
    if model["num_layers"] < 1:
        raise UserError(f"model.num_layers={model['num_layers']} must be at least 1")
    base = {name: model[name] for name in (*OVERRIDABLE, "d_model", "use_bias")}
    base["max_length"] = seq_len
    pattern = tuple(dict(overrides) for overrides in model["layer_overrides"]) or ({},)
    for overrides in pattern:
        for name in overrides:
            if name not in OVERRIDABLE:
                raise UserError(
                    f"model.layer_overrides cannot change {name!r}: it changes one of"
                    f" {', '.join(OVERRIDABLE)}{did_you_mean(name, OVERRIDABLE)}"
                )
    layers = tuple(
        AttentionSpec(**(base | pattern[i % len(pattern)])) for i in range(model["num_layers"])
    )
    inside = ("rope", "none")
    for layer in layers:
        if layer.position != model["position"] and layer.position not in inside:
            raise UserError(
                f"model.layer_overrides: position {layer.position!r} is added at the input and"
                " cannot differ by layer; a layer may use 'rope' or 'none'"
            )
    return ModelSpec(
        vocab_size=padded_vocab(tokenizer_size),
        d_model=model["d_model"],
        layers=layers,
        max_length=seq_len,
        position=model["position"],
        norm=model["norm"],
        mlp=model["mlp"],
        d_ff=int(round(model["mlp_ratio"] * model["d_model"] / 8)) * 8,
        dropout=model["dropout"],
        use_bias=model["use_bias"],
        tie_embeddings=model["tie_embeddings"],
        init=model["init"],
    )
