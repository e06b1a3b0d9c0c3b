"""Reads from a `config.json` how many bits a quantised model has per number, part by part.

Scales and zero points are counted with the numbers that they scale. What a method does not quantise
(embeddings, norms, routers, biases, most output heads) is counted with 16 bits per number.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

REST_BYTES = 2.0
# Modules of a layer, under the names that most files use for them.
_PARTS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "feed_forward": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "shared": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.down_proj"),
    "experts": ("mlp.experts.0.gate_proj", "mlp.experts.0.down_proj"),
}
# Keys with the modules that are not quantised.
_SKIP_KEYS = (
    "modules_to_not_convert",
    "ignored_layers",
    "ignore",
    "llm_int8_skip_modules",
    "exclude_modules",
)
_PREFIXES = ("model.", "model.language_model.", "language_model.model.")
# Bits of a number with its share of scales: of methods without options, of weights of quanto, of
# algorithms of ModelOpt.
_FIXED_BITS = {"mxfp4": 4 + 8 / 32, "fbgemm_fp8": 8.0, "eetq": 8.0, "bitnet": 2.0}
_QUANTO_BITS = {"int8": 8.0, "float8": 8.0, "int4": 4.25, "int2": 2.25}
_MODELOPT_BITS = {"FP8": 8.0, "NVFP4": 4 + 8 / 16, "W4A16_AWQ": 4 + 16 / 128}


@dataclasses.dataclass(frozen=True)
class Widths:
    """Bytes per learned number in the parts of one layer."""

    attention: float
    feed_forward: float
    shared: float
    experts: float
    rest: float = REST_BYTES


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The `quantization_config` of a file.

    Attributes:
      method: its name in the file.
      bits: bits of one quantised number with its share of scales; None if plan does not know them.
      skipped: patterns of the names of modules that are not quantised.
      only_experts: whether the method quantises experts alone.
      head: whether the output head is quantised too.
    """

    method: str
    bits: float | None
    skipped: tuple[str, ...] = ()
    only_experts: bool = False
    head: bool = False

    def widths(self, index: int) -> Widths:
        """Returns the bytes per number in the parts of layer `index`; `bits` must be known."""
        return Widths(**{part: self._bytes(part, index) for part in _PARTS})

    def head_bytes(self) -> float:
        """Returns the bytes per number of an output head that is not the embedding."""
        return self.bits / 8 if self.head and not self._skips("lm_head") else REST_BYTES

    def _bytes(self, part: str, index: int) -> float:
        """Returns the mean bytes per number of a part; some of its modules may be skipped."""
        if self.only_experts and part != "experts":
            return REST_BYTES
        modules = [f"layers.{index}.{module}" for module in _PARTS[part]]
        num_skipped = sum(
            any(self._skips(prefix + module) for prefix in _PREFIXES) for module in modules
        )
        share = num_skipped / len(modules)
        return share * REST_BYTES + (1 - share) * self.bits / 8

    def _skips(self, module: str) -> bool:
        return any(_matches(pattern, module) for pattern in self.skipped)


def read(values: Mapping) -> Quantization | None:
    """Returns the quantization of a file, None if it has none."""
    config = values.get("quantization_config") or values.get("compression_config")
    if not isinstance(config, dict):
        return None
    if isinstance(config.get("quantization"), dict):  # as ModelOpt writes it
        config = config | config["quantization"]
    method = str(config.get("quant_method") or config.get("quant_algo") or "unknown").lower()
    if method == "unknown" and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    skipped = []
    for key in _SKIP_KEYS:
        patterns = config.get(key)
        if isinstance(patterns, list):
            skipped += map(str, patterns)
    # With an invalid pattern it is not known which modules are quantised.
    bits = _bits(method, config) if all(map(_is_valid, skipped)) else None
    quantizes_head = method in ("compressed-tensors", "modelopt") or bool(config.get("lm_head"))
    return Quantization(
        method,
        bits,
        skipped=tuple(skipped),
        only_experts=method == "mxfp4",
        head=quantizes_head,
    )


def _bits(method: str, config: Mapping) -> float | None:
    """Returns the bits of a number with its share of scales; None if plan does not know them."""
    if method in _FIXED_BITS:
        return _FIXED_BITS[method]
    if method in ("gptq", "awq", "auto-round", "intel/auto-round", "auto_round"):
        number = _number(config.get("bits", config.get("w_bit")))
        group = _number(config.get("group_size", config.get("q_group_size")))
        # A group has a scale of 16 bits and a zero point as wide as a number.
        return None if number is None else number + _per_number(16 + number, group)
    if method == "fp8":
        return _fp8(config)
    if method == "bitsandbytes":
        return _bitsandbytes(config)
    if method in ("compressed-tensors", "modelopt"):
        return _groups(config)
    if method == "hqq":
        return _hqq(config)
    if method == "quanto":
        return _QUANTO_BITS.get(str(config.get("weights")))
    return None


def _fp8(config: Mapping) -> float | None:
    """Returns the bits of FP8, where the numbers of a block share a scale in float32."""
    block = config.get("weight_block_size")
    if block is None:
        return 8.0
    sizes = [_number(size) for size in block] if isinstance(block, list) else []
    if len(sizes) != 2 or not all(sizes):
        return None
    return 8 + 32 / (sizes[0] * sizes[1])


def _bitsandbytes(config: Mapping) -> float | None:
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return 8.0
    if not config.get("load_in_4bit") and not config.get("_load_in_4bit"):
        return None
    if config.get("bnb_4bit_use_double_quant"):
        # 64 numbers share a maximum of 8 bits, and 256 of these share one in float32.
        return 4 + 8 / 64 + 32 / (64 * 256)
    return 4 + 32 / 64  # 64 numbers share a maximum in float32


def _hqq(config: Mapping) -> float | None:
    options = config.get("quant_config")
    weights = options.get("weight_quant_params") if isinstance(options, dict) else None
    number = _number(weights.get("nbits")) if isinstance(weights, dict) else None
    if number is None:
        return None
    return number + _per_number(32, _number(weights.get("group_size")))


def _groups(config: Mapping) -> float | None:
    """Returns the bits of files of compressed-tensors and ModelOpt; None if groups differ."""
    if config.get("sparsity_config"):
        return None
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        return _MODELOPT_BITS.get(str(config.get("quant_algo", "")).upper())
    bits = {_group_bits(group) for group in groups.values()}
    return bits.pop() if len(bits) == 1 else None


def _group_bits(group: object) -> float | None:
    """Returns the bits of one entry of `config_groups`."""
    weights = group.get("weights") if isinstance(group, dict) else None
    number = _number(weights.get("num_bits")) if isinstance(weights, dict) else None
    if number is None:
        return None
    is_fp4 = weights.get("type") == "float" and number == 4
    scale = 8 if is_fp4 else 16
    if weights.get("symmetric") is False:
        scale += number  # the zero point
    return float(number + _per_number(scale, _number(weights.get("group_size"))))


def _per_number(bits: float, group: float | None) -> float:
    """Returns the bits per number of what a group shares; 0 for -1, a whole column."""
    return bits / group if group and group > 0 else 0.0


def _number(value: object) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _expression(pattern: str) -> str:
    """Returns the regular expression of a pattern: "re:..." is one, others may have stars.

    A name stands for the module itself and for all modules below it.
    """
    if pattern.startswith("re:"):
        return pattern[3:]
    escaped = re.escape(pattern).replace(r"\*", ".*")
    return rf"(.*\.)?{escaped}(\..*)?$"


def _is_valid(pattern: str) -> bool:
    try:
        re.compile(_expression(pattern))
    except re.error:
        return False
    return True


def _matches(pattern: str, module: str) -> bool:
    return re.match(_expression(pattern), module) is not None
