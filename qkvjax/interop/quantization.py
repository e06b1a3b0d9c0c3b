"""How a quantised file stores its weights: bits of a number of each part, by its keys.

Scales and zero points are counted with the numbers that they scale. What is left alone by a method
(embeddings, norms, routers, biases, most output heads) is counted in 16 bits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

REST_BYTES = 2.0
# Modules of a layer, by the names that most files use for them.
_PARTS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "feed_forward": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "shared": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.down_proj"),
    "experts": ("mlp.experts.0.gate_proj", "mlp.experts.0.down_proj"),
}
_SKIPS = (
    "modules_to_not_convert",
    "ignored_layers",
    "ignore",
    "llm_int8_skip_modules",
    "exclude_modules",
)
_PREFIXES = ("model.", "model.language_model.", "language_model.model.")


@dataclasses.dataclass(frozen=True)
class Widths:
    """Bytes of a learned number in the parts of one layer."""

    attention: float
    feed_forward: float
    shared: float
    experts: float
    rest: float = REST_BYTES


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The `quantization_config` of a file.

    Attributes:
      method: as the file names it.
      bits: of one quantised number, its share of scales included; None where plan does not know.
      skipped: patterns of modules that stay in 16 bits.
      only_experts: whether the method leaves everything but experts alone.
      head: whether the output head is quantised too.
    """

    method: str
    bits: float | None
    skipped: tuple[str, ...] = ()
    only_experts: bool = False
    head: bool = False

    def widths(self, index: int) -> Widths:
        """Returns the bytes of a number in layer `index`; `bits` must be known."""
        values = {name: self._part(name, index) for name in _PARTS}
        return Widths(**values)

    def head_bytes(self) -> float:
        """Returns the bytes of a number of an output head that is no embedding."""
        return self.bits / 8 if self.head and not self._skips("lm_head") else REST_BYTES

    def _part(self, name: str, index: int) -> float:
        if self.only_experts and name != "experts":
            return REST_BYTES
        modules = [f"layers.{index}.{module}" for module in _PARTS[name]]
        kept = sum(any(self._skips(prefix + one) for prefix in _PREFIXES) for one in modules)
        share = kept / len(modules)
        return share * REST_BYTES + (1 - share) * self.bits / 8

    def _skips(self, module: str) -> bool:
        return any(_matches(pattern, module) for pattern in self.skipped)


def read(values: Mapping) -> Quantization | None:
    """Returns how the file says that it is quantised; None where it does not."""
    config = values.get("quantization_config") or values.get("compression_config")
    if not isinstance(config, dict):
        return None
    if isinstance(config.get("quantization"), dict):  # as ModelOpt writes it
        config = config | config["quantization"]
    method = str(config.get("quant_method") or config.get("quant_algo") or "unknown").lower()
    if method == "unknown" and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    skipped = []
    for key in _SKIPS:
        named = config.get(key)
        skipped += [str(one) for one in named] if isinstance(named, list) else []
    # A pattern that cannot be read leaves open which modules are narrow.
    bits = _bits(method, config) if all(map(_readable, skipped)) else None
    quantizes_head = method in ("compressed-tensors", "modelopt") or bool(config.get("lm_head"))
    return Quantization(
        method,
        bits,
        skipped=tuple(skipped),
        only_experts=method == "mxfp4",
        head=quantizes_head,
    )


def _bits(method: str, config: Mapping) -> float | None:
    """Returns the bits of a number with its share of scales; None for what plan does not know."""
    number = _number(config.get("bits", config.get("w_bit")))
    group = _number(config.get("group_size", config.get("q_group_size")))
    if method == "mxfp4":
        return 4 + 8 / 32
    if method in ("gptq", "awq", "auto-round", "intel/auto-round", "auto_round"):
        # A group has a scale of 16 bits and a zero point of the width of a number.
        return None if number is None else number + _per_group(16 + number, group)
    if method == "fp8":
        block = config.get("weight_block_size")
        if block is None:
            return 8.0
        sizes = [_number(one) for one in block] if isinstance(block, list) else []
        return 8 + 32 / (sizes[0] * sizes[1]) if len(sizes) == 2 and all(sizes) else None
    if method in ("fbgemm_fp8", "eetq"):
        return 8.0
    if method == "bitsandbytes":
        return _bitsandbytes(config)
    if method in ("compressed-tensors", "modelopt"):
        return _groups(config)
    if method == "bitnet":
        return 2.0
    if method == "hqq":
        weights = config.get("quant_config")
        weights = weights.get("weight_quant_params") if isinstance(weights, dict) else None
        if not isinstance(weights, dict):
            return None
        number = _number(weights.get("nbits"))
        return (
            None if number is None else number + _per_group(32, _number(weights.get("group_size")))
        )
    if method == "quanto":
        named = {"int8": 8.0, "float8": 8.0, "int4": 4.25, "int2": 2.25}
        return named.get(str(config.get("weights")))
    return None


def _bitsandbytes(config: Mapping) -> float | None:
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return 8.0
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        # 64 numbers share a float32 maximum; nested, that is 8 bits and 256 of them share one.
        nested = config.get("bnb_4bit_use_double_quant")
        return 4 + (8 / 64 + 32 / (64 * 256) if nested else 32 / 64)
    return None


def _groups(config: Mapping) -> float | None:
    """Returns the bits of files of compressed-tensors and ModelOpt; all groups must agree."""
    groups = config.get("config_groups")
    if config.get("sparsity_config"):
        return None
    if not isinstance(groups, dict):
        algorithm = str(config.get("quant_algo", "")).upper()
        known = {"FP8": 8.0, "NVFP4": 4 + 8 / 16, "W4A16_AWQ": 4 + 16 / 128}
        return known.get(algorithm)
    found = set()
    for one in groups.values():
        weights = one.get("weights") if isinstance(one, dict) else None
        number = _number(weights.get("num_bits")) if isinstance(weights, dict) else None
        if number is None:
            return None
        group = _number(weights.get("group_size"))
        four_bit_float = weights.get("type") == "float" and number == 4
        scale = 8 if four_bit_float else 16
        if weights.get("symmetric") is False:
            scale += number
        found.add(number + (_per_group(scale, group) if group else 0))
    return float(found.pop()) if len(found) == 1 else None


def _per_group(bits: float, group: float | None) -> float:
    """Bits that each of `group` numbers adds; -1 is a whole column, where they vanish."""
    return bits / group if group and group > 0 else 0.0


def _number(value) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _expression(pattern: str) -> str:
    if pattern.startswith("re:"):
        return pattern[3:]
    escaped = re.escape(pattern).replace(r"\*", ".*")
    return rf"(.*\.)?{escaped}(\..*)?$"


def _readable(pattern: str) -> bool:
    try:
        re.compile(_expression(pattern))
    except re.error:
        return False
    return True


def _matches(pattern: str, module: str) -> bool:
    return re.match(_expression(pattern), module) is not None
