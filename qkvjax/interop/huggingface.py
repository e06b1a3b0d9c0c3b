"""Reads a Hugging Face `config.json` into our words, without weights or jax.

The counts follow the public modelling code of `transformers`; a file may leave out what its
configuration class defaults to, so those defaults are repeated here and named in the notes.

Letters: D model width, N query heads, K key-value heads, H head width, F feed-forward width,
V vocabulary, L layers, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from qkvjax.attention.spec import AttentionSpec
from qkvjax.errors import UserError, read_object
from qkvjax.interop.shapes import Layer, Model

MOST, MOST_LAYERS = 10**9, 10_000


@dataclasses.dataclass(frozen=True)
class _Family:
    """What a `model_type` means beyond the keys of its file.

    Attributes:
      gated: three feed-forward matrices instead of two.
      bias: "never", "qkv" (Qwen2), "all", or "key": what `attention_bias` says.
      qk_norm: RMS norms of width H on queries and keys.
      norms: norms of width D in a block.
      layernorm: norms with a bias.
      tied: whether head and embedding are one table when the file does not say.
      windows: which layers `sliding_window` binds when the file has no `layer_types`:
        "none", "all", "qwen" (behind `use_sliding_window`) or "pattern" (all but every n-th).
      defaults: of the configuration class, for keys that published files leave out.
    """

    gated: bool = True
    bias: str = "key"
    qk_norm: bool = False
    norms: int = 2
    layernorm: bool = False
    tied: bool = False
    windows: str = "all"
    defaults: Mapping = dataclasses.field(default_factory=dict)


_GEMMA = {"head_dim": 256}
_GEMMA3 = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131_072, "sliding_window": 4096, "sliding_window_pattern": 6,
}  # fmt: skip
_GEMMA4 = _GEMMA3 | {
    "vocab_size": 262_144, "sliding_window": 512, "global_head_dim": 512,
    "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144,
}  # fmt: skip
_FAMILIES = {
    "llama": _Family(windows="none"),
    "mistral": _Family(bias="never", defaults={"num_key_value_heads": 8}),
    "mixtral": _Family(bias="never", defaults={"num_key_value_heads": 8}),
    "phi3": _Family(bias="never"),
    "qwen2": _Family(bias="qkv", windows="qwen"),
    "qwen2_moe": _Family(bias="qkv", windows="qwen"),
    "qwen3": _Family(qk_norm=True, windows="qwen", defaults={"head_dim": 128}),
    "qwen3_moe": _Family(qk_norm=True, windows="qwen"),
    "gpt_oss": _Family(bias="all", windows="pattern",
                       defaults={"head_dim": 64, "sliding_window_pattern": 2}),
    "gemma": _Family(tied=True, windows="none", defaults=_GEMMA),
    "gemma2": _Family(tied=True, norms=4, windows="pattern",
                      defaults=_GEMMA | {"sliding_window": 4096, "sliding_window_pattern": 2}),
    "gemma3_text": _Family(tied=True, norms=4, qk_norm=True, windows="pattern", defaults=_GEMMA3),
    "gemma4_text": _Family(tied=True, norms=4, qk_norm=True, windows="pattern", defaults=_GEMMA4),
    "gpt2": _Family(gated=False, bias="all", layernorm=True, tied=True, windows="none"),
}  # fmt: skip
_GPT2_KEYS = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
}  # fmt: skip
# Keys of models whose memory of the past is not K and V a token, or not ours to count.
_REFUSED = {
    "kv_lora_rank": "multi-head latent attention caches a latent, not K and V",
    "n_routed_experts": "only num_experts and num_local_experts are read",
    "full_attention_interval": "linear-attention layers hold a state, not K and V",
    "attn_layer_period": "state-space layers hold a state, not K and V",
    "ssm_cfg": "state-space layers hold a state, not K and V",
    "altup_num_inputs": "Gemma 3n's extra streams are not counted here",
    "per_layer_config": "write global_head_dim and num_global_key_value_heads instead",
}


class _Keys:
    """The keys of a file, its family's defaults, and messages that name a missing one."""

    def __init__(self, values: Mapping, path: Path, family: _Family, where: str):
        self.values, self.path, self.family, self.where = values, path, family, where
        self.defaulted: list[str] = []

    def get(self, name: str, default=None):
        value = self.values.get(name)
        if value is None and name in self.family.defaults:
            value = self.family.defaults[name]
            if f"{name}={value}" not in self.defaulted:
                self.defaulted.append(f"{name}={value}")
        return default if value is None else value

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(name, default)
        if value is None:
            raise UserError(
                f"{self.path} lacks the key {self.where}{name!r}: plan needs it to count; add it"
                " from the model's own configuration"
            )
        most = MOST_LAYERS if name == "num_hidden_layers" else MOST
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UserError(
                f"{self.path}: {self.where}{name!r} is {repr(value)[:40]}, and must be a whole"
                f" number of at least {least} and at most {most:,}"
            )
        return value


def read(path: str | Path) -> Model:
    """Reads a `config.json`, or a folder that holds one.

    Raises:
      UserError: no such file, no JSON object, a missing or impossible value, or a model whose
        layers do not cache K and V.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} is no file: --model takes a local config.json or the folder that holds it, for"
            " example after `hf download ORG/NAME config.json`"
        )
    return from_values(read_object(path, "download it again"), path)


def from_values(values: Mapping, path: Path = Path("config.json")) -> Model:
    """The model that the parsed `values` describe; `path` is for messages."""
    notes, outer, where = [], values, ""
    if isinstance(values.get("text_config"), dict):
        values, where = values["text_config"], "text_config."
        notes.append("Counted is the language model; vision and audio towers are not.")
    model_type = str(values.get("model_type") or outer.get("model_type") or "")
    for key, reason in _REFUSED.items():
        if values.get(key) is not None:
            raise UserError(f"{path}: plan cannot count a model with {where}{key!r}: {reason}")
    if "n_embd" in values and model_type in ("", "gpt2"):
        model_type = "gpt2"
        values = dict(values) | {_GPT2_KEYS[k]: values[k] for k in _GPT2_KEYS if k in values}
    family = _FAMILIES.get(model_type)
    if family is None:
        notes.append(
            f"model_type {model_type!r} is not known here: counted like Llama from its keys, so"
            " compare the parameters with the published ones."
        )
        family = _Family()
    keys = _Keys(values, path, family, where)
    tied = values.get("tie_word_embeddings", outer.get("tie_word_embeddings"))
    if tied is None:
        tied = family.tied
        if model_type not in _FAMILIES:
            notes.append("tie_word_embeddings is not in the file: taken as false.")
    layers = _layers(keys, model_type)
    vocab, d = keys.whole("vocab_size"), keys.whole("hidden_size")
    learned = model_type == "gpt2"
    max_length = keys.whole("max_position_embeddings") if learned else None
    if keys.get("max_position_embeddings") is not None:
        max_length = keys.whole("max_position_embeddings")
    table = (0 if tied else vocab * d) + (max_length * d if learned else 0)
    other = vocab * d + d * (2 if family.layernorm else 1)
    macs = vocab * d
    if h := _per_layer_input(keys, model_type):
        table += keys.whole("vocab_size_per_layer_input") * len(layers) * h
        other += d * len(layers) * h + h
        macs += d * len(layers) * h
    if keys.defaulted:
        named = ", ".join(keys.defaulted)
        notes.append(f"Not in the file, so the defaults of {model_type}: {named}.")
    return Model(model_type, layers, table, other, macs, max_length, learned, tuple(notes))


def _layers(keys: _Keys, model_type: str) -> tuple[Layer, ...]:
    num_layers = keys.whole("num_hidden_layers")
    windows = _windows(keys, num_layers, model_type)
    own = num_layers - keys.whole("num_kv_shared_layers", 0, least=0)
    return tuple(_layer(keys, model_type, i, w, 0 < own <= i) for i, w in enumerate(windows))


def _layer(keys: _Keys, model_type: str, index: int, window: int | None, borrows: bool) -> Layer:
    family, d, n = keys.family, keys.whole("hidden_size"), keys.whole("num_attention_heads")
    k, tied_kv = keys.whole("num_key_value_heads", n), False
    head_dim = keys.whole("head_dim") if keys.get("head_dim") else None
    if model_type == "gemma4_text" and window is None:
        head_dim, tied_kv = keys.whole("global_head_dim"), bool(keys.get("attention_k_eq_v"))
        k = keys.whole("num_global_key_value_heads", k) if tied_kv else k
    biased = family.bias in ("qkv", "all") or (family.bias == "key" and keys.get("attention_bias"))
    try:
        attention = AttentionSpec(
            d_model=d, num_heads=n, num_kv_heads=k, head_dim=head_dim,
            sharing="q-k=v" if tied_kv else "q-k-v",
            position="none" if model_type == "gpt2" else "rope", qk_norm=family.qk_norm,
            window=window, use_bias=bool(biased),
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{keys.path}: {error}") from None
    dense = family.norms * d * (2 if family.layernorm else 1)
    if family.bias == "qkv":
        dense -= d  # the output projection of Qwen2 has no bias, which use_bias counts
    macs, experts = 0, {}
    if keys.get("num_local_experts") or keys.get("num_experts"):
        shared_macs, shared_params, experts = _experts(keys, model_type, index)
        macs, dense = macs + shared_macs, dense + shared_params
    if not experts or model_type == "gemma4_text":
        f = _feed_forward(keys, model_type, borrows)
        matrices = 3 if family.gated else 2
        macs += matrices * d * f
        dense += matrices * d * f
        if model_type == "gpt2" or keys.get("mlp_bias"):
            dense += (matrices - 1) * f + d
    if h := _per_layer_input(keys, model_type):
        macs += 2 * d * h
        dense += 2 * d * h + d
    if model_type == "gpt_oss":
        dense += n  # a learned sink a head
    return Layer(attention, dense, macs, reuses_cache=borrows, **experts)


def _feed_forward(keys: _Keys, model_type: str, borrows: bool) -> int:
    if model_type == "gpt2":
        return keys.whole("intermediate_size", 4 * keys.whole("hidden_size"))
    doubled = borrows and keys.get("use_double_wide_mlp")
    return keys.whole("intermediate_size") * (2 if doubled else 1)


def _per_layer_input(keys: _Keys, model_type: str) -> int:
    """Width of Gemma 4's embedding of every layer; 0 where there is none."""
    known = model_type == "gemma4_text"
    return keys.whole("hidden_size_per_layer_input", least=0) if known else 0


def _experts(keys: _Keys, model_type: str, index: int) -> tuple[int, int, dict]:
    """Multiply-adds and parameters that every token uses, and the fields of the experts.

    Empty fields mean that this layer is dense (`decoder_sparse_step`, `mlp_only_layers`).
    """
    every = keys.whole("decoder_sparse_step", 1)
    plain = keys.get("mlp_only_layers", [])
    if not isinstance(plain, list):
        raise UserError(f"{keys.path}: {keys.where}'mlp_only_layers' must be a list of layers")
    if index in plain or (index + 1) % every:
        return 0, 0, {}
    d = keys.whole("hidden_size")
    e = keys.whole("num_local_experts" if keys.get("num_local_experts") else "num_experts")
    used = keys.whole("top_k_experts" if model_type == "gemma4_text" else "num_experts_per_tok")
    if used > e:
        raise UserError(f"{keys.path}: {used} experts a token, but there are {e}: correct one")
    # Mixtral and gpt-oss keep the width of an expert in intermediate_size.
    own_key = keys.get("num_local_experts") and not keys.get("moe_intermediate_size")
    f = keys.whole("intermediate_size" if own_key else "moe_intermediate_size")
    macs = params = d * e
    expert = 3 * d * f
    if model_type == "gemma4_text":
        params += d + e + 3 * d  # the router's scales, three more norms
    elif model_type == "gpt_oss":
        params += e
        expert += 2 * f + d
    if keys.get("shared_expert_intermediate_size"):
        shared = 3 * d * keys.whole("shared_expert_intermediate_size") + d
        macs, params = macs + shared, params + shared
    fields = {"num_experts": e, "experts_per_token": used, "expert_params": expert}
    return macs, params, fields | {"expert_macs": 3 * d * f}


def _windows(keys: _Keys, num_layers: int, model_type: str) -> list[int | None]:
    """Keys that a query of each layer sees; None means all."""
    types = keys.get("layer_types")
    if types is None:
        types = _layer_types(keys, num_layers)
    if not isinstance(types, list) or len(types) != num_layers:
        raise UserError(
            f"{keys.path}: {keys.where}'layer_types' must be a list with an entry for each of the"
            f" {num_layers} layers"
        )
    if model_type == "gemma4_text":
        types = [*types[:-1], "full_attention"]  # as its configuration class forces
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise UserError(
                f"{keys.path}: plan counts layers of full_attention and sliding_attention, and"
                f" {keys.where}'layer_types' has {name!r}, which does not cache K and V like them"
            )
    return [keys.whole("sliding_window") if t == "sliding_attention" else None for t in types]


def _layer_types(keys: _Keys, num_layers: int) -> list[str]:
    kind, full = keys.family.windows, ["full_attention"] * num_layers
    off = kind == "none" or keys.values.get("use_sliding_window") is False
    if off or keys.get("sliding_window") is None:
        return full
    first, every = 0, None
    if kind == "qwen":
        if not keys.get("use_sliding_window"):
            return full
        first = keys.whole("max_window_layers", least=0)
    if kind == "pattern" or keys.get("sliding_window_pattern") is not None:
        every = keys.whole("sliding_window_pattern")
    return [
        "full_attention" if i < first or (every and (i + 1) % every == 0) else "sliding_attention"
        for i in range(num_layers)
    ]
