"""What a whole model is and what it costs, without importing jax.

Letters: T positions, D model width, F feed-forward width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from qkvjax.attention.spec import AttentionSpec
from qkvjax.errors import UserError, among
from qkvjax.models.feedforward import FeedForwardSpec, parse_feed_forward

if TYPE_CHECKING:
    from qkvjax.fields import Model

NORMS = ("layernorm", "rmsnorm")
INITS = ("normal", "fan_in", "uniform")
KINDS = ("lm", "encoder", "vit")
# What a model's labels belong to: each token, the sequence as a whole, or one of its tokens
# (which one is the label).
OUTPUTS = ("tokens", "sequence", "choice")
# Fields of the attention layer that `layer_overrides` may change.
OVERRIDABLE = (
    "sharing",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "position",
    "rotary_values",
    "rotary_fraction",
    "rotary_base",
    "qk_norm",
    "window",
    "score",
)
# Up to this depth the stack is unrolled and each layer keeps arrays of its own. On two cores a
# scan costs a shallow model a quarter of its step, and slicing stacked weights 5 % of it; not to
# scan costs a deep model minutes of compilation.
UNROLL_UP_TO = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackSpec:
    """The blocks of a model and what surrounds them, as far as no data are needed to know it.

    Attributes:
      d_model: D.
      layers: one AttentionSpec a layer.
      max_length: rows of the learned position table, and of scores that have a limit.
      kind: "lm" (causal, ids), "encoder" (bidirectional) or "vit" (the same with a class token
        before the patches).
      position: "none", "learned", "sincos" (added to the embedding) or "rope".
      norm: "layernorm" (gain, and a bias where use_bias) or "rmsnorm".
      mlp: what the feed-forward is, see `FeedForwardSpec`.
      d_ff: F.
      dropout: rate on the embedding and on both residual branches, in training; in a ViT on the
        embedding and on both feed-forward maps, as in the paper.
      use_bias: biases on every linear map and on LayerNorm.
      tie_embeddings: whether the output head is the embedding, transposed.
      init: "normal" is N(0, 0.02^2) everywhere (GPT-2, the paper's language models); "fan_in"
        is N(0, 1/fan_in) with both output projections scaled by 1/sqrt(2 L); "uniform" is
        U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases (torch.nn.Linear, the paper's
        encoders).
      position_std: of the initial normal values of a learned position table; None follows
        the embedding: 0.02 under "normal", else 1 in an encoder and 1/sqrt(D) before the
        embedding's scaling in a language model.
    """

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
    kind: str = "lm"
    position_std: float | None = None

    def __post_init__(self):
        if not self.layers:
            raise UserError("model.num_layers=0 must be at least 1")
        for name, known in {"norm": NORMS, "init": INITS, "kind": KINDS}.items():
            value = getattr(self, name)
            if value not in known:
                use = among(value, known)
                raise UserError(f"model.{name}={value!r} is unknown: use one of {use}")
        if self.kind != "lm" and self.tie_embeddings:
            raise UserError(
                f"model.kind={self.kind!r} has no embedding of tokens that a head could be tied"
                " to: set model.tie_embeddings=False"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout} must be in [0, 1)")
        if self.d_ff < 1:
            raise UserError(f"the feed-forward width is {self.d_ff}: raise model.mlp_ratio")
        shared = self.feed_forward.layers
        if self.num_layers % shared:
            raise UserError(
                f"model.mlp={self.mlp!r}: groups of {shared} layers do not divide the"
                f" {self.num_layers} layers"
            )
        if self.feed_forward.experts > 1 and (self.kind != "lm" or self.use_bias):
            raise UserError(
                f"model.mlp={self.mlp!r}: experts are for language models without biases: set"
                " model.use_bias=False, or leave experts out"
            )

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def bounded(self) -> bool:
        """Whether sequences end at `max_length`: learned positions, or scores that end there."""
        return self.position == "learned" or any(layer.bounded for layer in self.layers)

    @property
    def feed_forward(self) -> FeedForwardSpec:
        """What `mlp` says."""
        return parse_feed_forward(self.mlp)

    @property
    def period(self) -> int:
        """Layers in one turn of the stack's scan, as `scan_period` says."""
        return scan_period(self.layers, self.feed_forward.layers)

    @property
    def pattern(self) -> int:
        """Layers after which the stack repeats, as `layer_pattern` says."""
        return layer_pattern(self.layers, self.feed_forward.layers)

    def block_macs(self, length: int) -> int:
        """Multiply-adds of the blocks for one sequence: matrix products and attention, no norms.

        `length` counts the class token of a ViT.
        """
        mlp = self.feed_forward.forward_macs(self.d_model, self.d_ff)
        return sum(layer.forward_macs(length) + length * mlp for layer in self.layers)

    def cache_bytes_per_token(self, dtype="bfloat16", layout: str | None = None) -> int:
        """Bytes the decode cache holds for each token, over all layers; 0 where nothing is
        decoded."""
        if self.kind != "lm":
            return 0
        return sum(layer.cache_bytes_per_token(dtype, layout) for layer in self.layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec(StackSpec):
    """A model: pre-norm blocks of attention and feed-forward between an input and a head.

    Attributes:
      vocab_size: V, rows of the embedding (at least the tokenizer's ids); of an encoder or a
        ViT the width of its input vectors, of which ids are the one-hot ones.
      num_outputs: classes of the head; of a language model, V.
      output: what is labelled, one of OUTPUTS; "sequence" reads the class token.
      num_ids: of a language model, ids of the tokenizer, which the rows of the embedding beyond
        them pad; None means V.
    """

    vocab_size: int
    num_outputs: int | None = None
    output: str = "tokens"
    num_ids: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.num_outputs is None:
            object.__setattr__(self, "num_outputs", self.vocab_size)

    @property
    def num_params(self) -> int:
        """Learned numbers of the model, exactly."""
        norm = self.d_model * (2 if self.norm == "layernorm" and self.use_bias else 1)
        mlp = self.feed_forward.num_params(self.d_model, self.d_ff, self.use_bias)
        total = mlp * (self.num_layers // self.feed_forward.layers) + norm
        total += sum(layer.num_params + 2 * norm for layer in self.layers)
        if self.kind == "lm":
            total += (1 if self.tie_embeddings else 2) * self.vocab_size * self.d_model
        else:
            total += (self.vocab_size + self.use_bias) * self.d_model
            total += (self.d_model + self.use_bias) * self.num_outputs
            total += self.d_model if self.kind == "vit" else 0
        if self.position == "learned":
            total += self.max_length * self.d_model
        return total

    def forward_macs(self, length: int) -> int:
        """Multiply-adds of one sequence: matrix products and attention, no lookups or norms.

        `length` counts the class token of a ViT. An encoder's input is taken as ids.
        """
        labelled = 1 if self.output == "sequence" else length
        patches = (length - 1) * self.vocab_size * self.d_model if self.kind == "vit" else 0
        return self.block_macs(length) + patches + labelled * self.d_model * self.num_outputs


def scan_period(layers: tuple, shared: int = 1) -> int:
    """Layers whose parameters lie apart, a multiple of `shared`: all of a shallow stack, else
    those of the pattern that repeats."""
    return len(layers) if len(layers) <= UNROLL_UP_TO else layer_pattern(layers, shared)


def layer_pattern(layers: tuple, shared: int = 1) -> int:
    """Layers after which the same layers follow again, a multiple of `shared`; L where no pattern
    repeats."""
    for p in range(shared, len(layers), shared):
        if len(layers) % p == 0 and layers == layers[:p] * (len(layers) // p):
            return p
    return len(layers)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def padded_vocab(tokenizer_size: int) -> int:
    """Embedding rows for a tokenizer: rounded up to 8, or to 128 above 4096 ids.

    50,257 ids of GPT-2 become the 50,304 rows of the paper. Ids without a token are never
    sampled.
    """
    return round_up(tokenizer_size, 128 if tokenizer_size > 4096 else 8)


def model_spec(
    model: Model,
    num_inputs: int,
    seq_len: int,
    num_outputs: int | None = None,
    output: str = "tokens",
    implementation: str = "auto",
) -> ModelSpec:
    """Returns the spec of the `model` group of a configuration, for its data.

    Args:
      model: the group.
      num_inputs: number of ids of the tokenizer, or width of the input vectors.
      seq_len: length of a sequence, a ViT's class token included.
      num_outputs, output: classes, and what has one; None and "tokens" for a language model.
      implementation: what computes attention.

    Raises:
      UserError: values that do not fit together.
    """
    text = model.kind == "lm"
    return ModelSpec(
        vocab_size=padded_vocab(num_inputs) if text else num_inputs,
        num_outputs=None if text else num_outputs or num_inputs,
        output=output,
        num_ids=num_inputs if text else None,
        **_stack_fields(model, seq_len, implementation),
    )


def stack_spec(model: Model, seq_len: int) -> StackSpec:
    """Returns the blocks of the `model` group of a configuration, whatever its data.

    Raises:
      UserError: values that do not fit together.
    """
    return StackSpec(**_stack_fields(model, seq_len))


def _stack_fields(model: Model, seq_len: int, implementation: str = "auto") -> dict[str, object]:
    """Returns the arguments of `StackSpec`."""
    same = ("d_model", "position", "norm", "mlp", "dropout", "use_bias", "tie_embeddings", "kind")
    init, position_std = _parse_init(model.init)
    return {
        "layers": layer_specs(model, seq_len, implementation),
        "max_length": _max_length(model, seq_len),
        "d_ff": int(round(model.mlp_ratio * model.d_model / 8)) * 8,
        "init": init,
        "position_std": position_std,
        **{name: getattr(model, name) for name in same},
    }


def layer_specs(
    model: Model, seq_len: int, implementation: str = "auto"
) -> tuple[AttentionSpec, ...]:
    """Returns the attention of each layer, as `model_spec`."""
    max_length = _max_length(model, seq_len)
    base = {name: getattr(model, name) for name in (*OVERRIDABLE, "d_model", "use_bias")}
    base["max_length"] = max_length
    base["causal"] = model.kind == "lm"
    base["implementation"] = implementation
    pattern = [dict(overrides) for overrides in model.layer_overrides] or [{}]
    for overrides in pattern:
        for name in overrides:
            if name not in OVERRIDABLE:
                raise UserError(
                    f"model.layer_overrides cannot change {name!r}: it changes one of"
                    f" {among(name, OVERRIDABLE)}"
                )
    layers = tuple(
        AttentionSpec(**(base | pattern[i % len(pattern)])) for i in range(model.num_layers)
    )
    for layer in layers:
        if layer.position not in ("rope", "none", model.position):
            raise UserError(
                f"model.layer_overrides: position {layer.position!r} is added at the input and"
                " cannot differ by layer; a layer may use 'rope' or 'none'"
            )
    return layers


def _max_length(model: Model, seq_len: int) -> int:
    """Returns the number of positions that there is room for."""
    max_length = model.max_length or seq_len
    if max_length < seq_len:
        raise UserError(
            f"model.max_length={max_length} is less than the {seq_len} tokens of a sequence"
            " (data.seq_len): raise it, or unset it"
        )
    return max_length


def _parse_init(text: str) -> tuple[str, float | None]:
    """("uniform", 0.02) of "uniform(positions=0.02)"; None without the bracket."""
    name, bracket, rest = text.replace(" ", "").partition("(")
    if not bracket:
        return name, None
    found = re.fullmatch(r"positions=([0-9.]+(?:e-?[0-9]+)?)\)", rest)
    try:
        return name, float(found[1])
    except (TypeError, ValueError):
        raise UserError(
            f"model.init={text!r} is not understood: write one of {', '.join(INITS)}, and behind it"
            " (positions=0.02) where learned positions begin otherwise"
        ) from None
