"""What a whole model is and what it costs, without importing jax.

`StackSpec` describes the blocks, for which no data are needed; `ModelSpec` adds input and output.

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
# What has a label: "tokens", each token; "sequence", the sequence as a whole; "choice", also the
# sequence, and the label says which of its tokens is right.
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
# Up to this depth each layer has arrays of its own; deeper stacks keep layers that are alike in one
# array, to be scanned. `models.transformer` gives the reasons.
UNROLL_UP_TO = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackSpec:
    """The part of a model that does not depend on its data: the blocks, norms and positions.

    Attributes:
      d_model: D.
      layers: the AttentionSpec of each layer.
      max_length: rows of the learned position table and of score modifiers that have a table.
      kind: "lm" (causal, ids), "encoder" (bidirectional) or "vit" (the same with a class token
        before the patches).
      position: "none", "learned", "sincos" (added to the embedding) or "rope".
      norm: "layernorm" (gain, and a bias where use_bias) or "rmsnorm".
      mlp: the feed-forward as text, see `FeedForwardSpec`.
      d_ff: F.
      dropout: rate on the embedding and on both residual branches, in training; in a ViT on the
        embedding and on both feed-forward maps, as in the paper.
      use_bias: biases on every linear map and on LayerNorm.
      tie_embeddings: whether the output head is the embedding, transposed.
      init: "normal" is N(0, 0.02^2) everywhere (GPT-2, the paper's language models); "fan_in"
        is N(0, 1/fan_in) with both output projections scaled by 1/sqrt(2 L); "uniform" is
        U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases (torch.nn.Linear, the paper's
        encoders).
      position_std: standard deviation of the initial values of a learned position table. None
        means 0.02 where init is "normal"; else 1 in an encoder, 0.02 in a ViT, and 1/sqrt(D) in a
        language model, as its embedding has before it is scaled.
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
        for name, choices in {"norm": NORMS, "init": INITS, "kind": KINDS}.items():
            value = getattr(self, name)
            if value not in choices:
                use = among(value, choices)
                raise UserError(f"model.{name}={value!r} is unknown: use one of {use}")
        if self.kind != "lm" and self.tie_embeddings:
            raise UserError(
                f"model.kind={self.kind!r} has no token embedding to tie the head to: set"
                " model.tie_embeddings=False"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout} must be in [0, 1)")
        if self.d_ff < 1:
            raise UserError(f"the feed-forward width is {self.d_ff}: raise model.mlp_ratio")
        group = self.feed_forward.layers
        if self.num_layers % group:
            raise UserError(
                f"model.mlp={self.mlp!r}: groups of {group} layers do not divide the"
                f" {self.num_layers} layers: set model.num_layers to a multiple of {group}"
            )
        if self.feed_forward.experts > 1 and (self.kind != "lm" or self.use_bias):
            raise UserError(
                f"model.mlp={self.mlp!r}: experts need a language model without biases: set"
                " model.kind='lm' and model.use_bias=False, or leave experts out"
            )

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def bounded(self) -> bool:
        """Whether sequences end at `max_length`: learned positions, or score modifiers with a
        table."""
        return self.position == "learned" or any(layer.bounded for layer in self.layers)

    @property
    def feed_forward(self) -> FeedForwardSpec:
        """The feed-forward that `mlp` describes."""
        return parse_feed_forward(self.mlp)

    @property
    def period(self) -> int:
        """Number of layers that are stored apart, see `scan_period`."""
        return scan_period(self.layers, self.feed_forward.layers)

    @property
    def pattern(self) -> int:
        """Number of layers after which the stack repeats, see `layer_pattern`."""
        return layer_pattern(self.layers, self.feed_forward.layers)

    def block_macs(self, length: int) -> int:
        """Returns the multiply-adds of the blocks for one sequence, without norms.

        `length` counts the class token of a ViT.
        """
        mlp = self.feed_forward.forward_macs(self.d_model, self.d_ff)
        return sum(layer.forward_macs(length) + length * mlp for layer in self.layers)

    def cache_bytes_per_token(self, dtype="bfloat16", layout: str | None = None) -> int:
        """Returns the bytes of the decode cache for each token, over all layers.

        0 for models that are not language models, because they decode nothing.
        """
        if self.kind != "lm":
            return 0
        return sum(layer.cache_bytes_per_token(dtype, layout) for layer in self.layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec(StackSpec):
    """A model: pre-norm blocks of attention and feed-forward between an input and a head.

    Attributes:
      vocab_size: V. In a language model, rows of the embedding: at least as many as the tokenizer
        has ids. In an encoder or a ViT, the width of its input vectors; an id stands for a one-hot
        vector.
      num_outputs: classes of the head; of a language model, V.
      output: what is labelled, one of OUTPUTS; "sequence" reads the first token, in a ViT the
        class token.
      num_ids: ids of a language model's tokenizer; the other rows of the embedding are padding.
        None means V.
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
        norm_has_bias = self.norm == "layernorm" and self.use_bias
        norm = self.d_model * (2 if norm_has_bias else 1)
        mlp = self.feed_forward.num_params(self.d_model, self.d_ff, self.use_bias)
        total = mlp * (self.num_layers // self.feed_forward.layers)
        total += sum(layer.num_params + 2 * norm for layer in self.layers)
        total += norm  # behind the last block
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
        """Returns the multiply-adds of one sequence: matrix products and attention.

        Lookups and norms do not count. An encoder's input is taken as ids, which are looked up.

        Args:
          length: T, a ViT's class token included.
        """
        labels = 1 if self.output == "sequence" else length
        head = labels * self.d_model * self.num_outputs
        patches = 0
        if self.kind == "vit":
            patches = (length - 1) * self.vocab_size * self.d_model
        return self.block_macs(length) + patches + head


def scan_period(layers: tuple, group: int = 1) -> int:
    """Returns the number of layers that are stored apart, a multiple of `group`.

    All layers of a shallow stack; in a deep one, those of the pattern that repeats. Layer i has its
    parameters in the same arrays as the layers i + period, i + 2 period, ...

    Args:
      layers: what describes each layer; equal ones are alike.
      group: how many consecutive layers share a feed-forward.
    """
    if len(layers) <= UNROLL_UP_TO:
        return len(layers)
    return layer_pattern(layers, group)


def layer_pattern(layers: tuple, group: int = 1) -> int:
    """Returns the length of the shortest pattern of layers that repeats; L where none does.

    It is a multiple of `group`. Arguments as in `scan_period`.
    """
    for length in range(group, len(layers), group):
        repeats, rest = divmod(len(layers), length)
        if rest == 0 and layers == layers[:length] * repeats:
            return length
    return len(layers)


def round_up(value: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def padded_vocab(tokenizer_size: int) -> int:
    """Returns the rows of the embedding: the ids rounded up to 8, or to 128 above 4096 ids.

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
      num_outputs: classes; None means as many as inputs. Not read for a language model.
      output: what is labelled, one of OUTPUTS; "tokens" for a language model.
      implementation: name of the implementation of attention.

    Raises:
      UserError: values that do not fit together.
    """
    fields = _stack_fields(model, seq_len, implementation)
    if model.kind == "lm":
        vocab_size = padded_vocab(num_inputs)
        return ModelSpec(vocab_size=vocab_size, output=output, num_ids=num_inputs, **fields)
    num_outputs = num_outputs or num_inputs
    return ModelSpec(vocab_size=num_inputs, num_outputs=num_outputs, output=output, **fields)


def stack_spec(model: Model, seq_len: int) -> StackSpec:
    """Returns the spec of the blocks of the `model` group of a configuration.

    Raises:
      UserError: values that do not fit together.
    """
    return StackSpec(**_stack_fields(model, seq_len))


def _stack_fields(model: Model, seq_len: int, implementation: str = "auto") -> dict[str, object]:
    """Returns the arguments of `StackSpec`."""
    init, position_std = _parse_init(model.init)
    return {
        "d_model": model.d_model,
        "layers": layer_specs(model, seq_len, implementation),
        "max_length": _max_length(model, seq_len),
        "position": model.position,
        "norm": model.norm,
        "mlp": model.mlp,
        "d_ff": int(round(model.mlp_ratio * model.d_model / 8)) * 8,
        "dropout": model.dropout,
        "use_bias": model.use_bias,
        "tie_embeddings": model.tie_embeddings,
        "init": init,
        "kind": model.kind,
        "position_std": position_std,
    }


def layer_specs(
    model: Model, seq_len: int, implementation: str = "auto"
) -> tuple[AttentionSpec, ...]:
    """Returns the attention of each layer of the `model` group of a configuration.

    Args:
      model: the group.
      seq_len: length of a sequence, a ViT's class token included.
      implementation: name of the implementation of attention.

    Raises:
      UserError: values that do not fit together.
    """
    base = {name: getattr(model, name) for name in (*OVERRIDABLE, "d_model", "use_bias")}
    base["max_length"] = _max_length(model, seq_len)
    base["causal"] = model.kind == "lm"
    base["implementation"] = implementation
    # The overrides are a pattern over the layers, which repeats.
    pattern = [dict(overrides) for overrides in model.layer_overrides] or [{}]
    _check_overrides(pattern)
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


def _check_overrides(pattern: list[dict]) -> None:
    """Raises UserError for a field that layers cannot change."""
    for overrides in pattern:
        for name in overrides:
            if name not in OVERRIDABLE:
                raise UserError(
                    f"model.layer_overrides cannot change {name!r}: use one of"
                    f" {among(name, OVERRIDABLE)}"
                )


def _max_length(model: Model, seq_len: int) -> int:
    """Returns the number of positions that tables have rows for."""
    max_length = model.max_length or seq_len
    if max_length < seq_len:
        raise UserError(
            f"model.max_length={max_length} is less than the {seq_len} tokens of a sequence"
            " (data.seq_len): raise it, or unset it"
        )
    return max_length


def _parse_init(text: str) -> tuple[str, float | None]:
    """Returns ("uniform", 0.02) for "uniform(positions=0.02)", ("uniform", None) for "uniform".

    Raises:
      UserError: the text is not understood.
    """
    name, bracket, rest = text.replace(" ", "").partition("(")
    if not bracket:
        return name, None
    match = re.fullmatch(r"positions=([0-9.]+(?:e-?[0-9]+)?)\)", rest)
    try:
        return name, float(match[1])
    except (TypeError, ValueError):  # no match, or a number such as 0.0.2
        raise UserError(
            f"model.init={text!r} is not understood: write one of {', '.join(INITS)}. Append"
            " (positions=0.02) for another standard deviation of learned positions"
        ) from None
