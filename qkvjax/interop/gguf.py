"""Reads models of Llama's architecture from GGUF files, llama.cpp's format, into our words.

Numbers are widened to float32 whatever they were quantised to. Two things differ from ours:

- llama.cpp rotates neighbours, (0, 1), (2, 3), ..., and keeps the rows of W_q and W_k in that
  order; we rotate halves, as the checkpoints do that the files were made from.
- the file's norms add `layer_norm_rms_epsilon` to the mean square, ours NORM_EPSILON. A residual
  stream that is scaled by c = sqrt(NORM_EPSILON / epsilon) gives the same model: the embedding and
  both output maps are multiplied by c, and the last norm's gain divided by it where the embedding
  is the head as well.

Letters: D model width, N query heads, K key-value heads, H head width, V vocabulary, L layers.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qkvjax.data.compression import first_bytes
from qkvjax.data.formats import HEAD, identify
from qkvjax.errors import UserError
from qkvjax.kernels.stored import NORM_EPSILON
from qkvjax.models.spec import scan_period

# Keys that stand for something our model does not compute, with the values that do not.
_PLAIN = {
    "expert_count": (0,),
    "rope.scaling.type": ("none",),
    "attention.sliding_window": (0,),
    "attention.logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "attention.scale": (0,),
}
# How the texts of a byte-level BPE are cut before they are merged, as tokenizer.json says it.
_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTE_LEVEL]},
}
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
# What a layer is made of: our name -> the file's.
_LAYER = {
    "attention_norm.gain": "attn_norm",
    "attention.projections.q.weight": "attn_q",
    "attention.projections.k.weight": "attn_k",
    "attention.projections.v.weight": "attn_v",
    "attention.output.weight": "attn_output",
    "mlp_norm.gain": "ffn_norm",
    "mlp.gate.weight": "ffn_gate",
    "mlp.up.weight": "ffn_up",
    "mlp.down.weight": "ffn_down",
}


class Imported(NamedTuple):
    """A model from a file.

    Attributes:
      fields: of the config's `model` group.
      context: tokens of the longest sequence it was made for.
      arrays: float32, by the names that checkpoints use, without "model.".
      tokenizer: the content of a tokenizer.json.
      quantization: types of the file's matrices, as "Q4_1, Q8_0".
    """

    fields: dict
    context: int
    arrays: dict[str, np.ndarray]
    tokenizer: dict
    quantization: str


def read(path: str | Path) -> Imported:
    """Reads a GGUF file.

    Raises:
      UserError: no such file, a damaged or truncated one, another architecture, or a model that
        ours is not equal to.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need an extra package: pip install qkvjax[gguf]") from None
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: give --source a .gguf file")
    try:
        reader = gguf.GGUFReader(path)
        file = _File(path, reader)
        file.require_plain()
        return _model(file, gguf.dequantize)
    except (ValueError, IndexError, KeyError, TypeError, ArithmeticError, struct.error) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    """What is said of a file that the library cannot read."""
    if "GGMLQuantizationType" in str(error) or "which we cannot handle" in str(error):
        return UserError(
            f"{path} is newer than the installed gguf {importlib.metadata.version('gguf')}"
            f" ({error}): pip install --upgrade gguf, or take the model in another quantisation, as"
            " Q8_0 or F16"
        )
    text = f"{path} is damaged, truncated or no GGUF file ({type(error).__name__}: {error})"
    head = first_bytes(path, HEAD)
    if head and not head.startswith(b"GGUF"):
        return UserError(f"{text}: it is {identify(head).name}; give --source a .gguf file")
    return UserError(f"{text}: copy it again")


class _File:
    """A file's keys and tensors, and messages about them."""

    def __init__(self, path: Path, reader):
        self.path = path
        self.values = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def get(self, name: str, default=None):
        return self.values.get(f"llama.{name}", default)

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{self.path}: llama.{name} is {value!r}, and must be a whole number")
        return value

    def require_plain(self) -> None:
        count = self.values.get("split.count", 1)
        if isinstance(count, int) and count > 1:
            number = int(self.values.get("split.no", 0)) + 1
            raise UserError(
                f"{self.path} is shard {number} of {count} of a model: merge them with"
                f" llama-gguf-split --merge FIRST_SHARD {_merged(self.path)}, and import that"
            )
        architecture = self.values.get("general.architecture")
        if architecture != "llama":
            raise UserError(
                f"{self.path} holds a model of architecture {architecture!r}: convert import reads"
                " 'llama' with a byte-level BPE (SmolLM, SmolLM2 and others of that form)"
            )
        for name, plain in _PLAIN.items():
            if self.get(name, plain[0]) not in plain:
                raise UserError(
                    f"{self.path} has llama.{name}={self.get(name)!r}, which our model does not"
                    " compute: convert import reads models without it"
                )


def _model(file: _File, dequantize) -> Imported:
    tokenizer = _tokenizer(file)  # first: it refuses at once what takes minutes to widen
    layers, d = file.whole("block_count"), file.whole("embedding_length")
    heads = file.whole("attention.head_count")
    kv_heads = file.whole("attention.head_count_kv", heads)
    width = file.whole("attention.key_length", d // heads)
    rotary = file.whole("rope.dimension_count", width)
    inner = file.whole("feed_forward_length")
    if inner % 8:
        raise UserError(f"{file.path}: a feed-forward width of {inner} is no multiple of 8")
    epsilon = file.get("attention.layer_norm_rms_epsilon", 1e-5)
    scale = (NORM_EPSILON / epsilon) ** 0.5
    types, taken = set(), set()

    def array(name: str, *shape: int) -> np.ndarray:
        tensor = file.tensors.get(f"{name}.weight")
        if tensor is None:
            raise UserError(f"{file.path} has no tensor {name}.weight: copy it again")
        taken.add(tensor.name)
        kind = tensor.tensor_type.name
        try:
            found = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        except RuntimeError as error:  # what the library does not implement
            raise UserError(
                f"{file.path}: {tensor.name} is quantised as {kind}, which the installed gguf"
                f" {importlib.metadata.version('gguf')} cannot widen ({error}): pip install"
                " --upgrade gguf, or take the model in another quantisation, as Q8_0 or F16"
            ) from None
        if found.shape != shape:
            raise UserError(f"{file.path}: {tensor.name} is {found.shape}, where {shape} was due")
        if len(shape) == 2:
            types.add(kind)
        return found

    def halves(rows: np.ndarray) -> np.ndarray:
        """Rows [n * H, D] from neighbours to halves."""
        by_head = rows.reshape(-1, width, d)
        turned = by_head[:, :rotary].reshape(-1, rotary // 2, 2, d).swapaxes(1, 2)
        parts = [turned.reshape(-1, rotary, d), by_head[:, rotary:]]
        return np.concatenate(parts, axis=1).reshape(rows.shape)

    rows = {"attn_q": heads * width, "attn_k": kv_heads * width, "attn_v": kv_heads * width}
    shapes = {name: (n, d) for name, n in rows.items()} | {
        "attn_output": (d, heads * width),
        "ffn_gate": (inner, d),
        "ffn_up": (inner, d),
        "ffn_down": (d, inner),
        "attn_norm": (d,),
        "ffn_norm": (d,),
    }

    def layer(i: int, name: str) -> np.ndarray:
        found = array(f"blk.{i}.{name}", *shapes[name])
        if name in ("attn_q", "attn_k"):
            found = halves(found)
        if name in ("attn_output", "ffn_down"):
            found = found * np.float32(scale)
        return found.T  # ours map from the left

    period = scan_period((None,) * layers)  # all are alike
    arrays = {
        f"stack.blocks.{j}.{ours}": np.stack([layer(i, name) for i in range(j, layers, period)])
        for ours, name in _LAYER.items()
        for j in range(period)
    }
    tokens = file.values["tokenizer.ggml.tokens"]
    embedding = array("token_embd", len(tokens), d)
    gain = array("output_norm", d)
    tied = "output.weight" not in file.tensors
    if not tied:
        arrays["head.weight"] = array("output", len(tokens), d).T
    arrays["embedding"] = embedding * np.float32(scale)
    arrays["norm.gain"] = gain / np.float32(scale) if tied else gain
    if unknown := sorted(set(file.tensors) - taken):
        raise UserError(
            f"{file.path} has tensors that our model has no place for, the first {unknown[0]!r}:"
            " convert import reads Llama's architecture without biases and other additions"
        )
    fields = {
        "kind": "lm",
        "d_model": d,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": width,
        "sharing": "q-k-v",
        "position": "rope",
        "rotary_fraction": rotary / width,
        "rotary_base": float(file.get("rope.freq_base", 1e4)),
        "qk_norm": False,
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "mlp_ratio": inner / d,
        "tie_embeddings": tied,
        "init": "normal",
    }
    context = file.whole("context_length")
    return Imported(fields, context, arrays, tokenizer, ", ".join(sorted(types)))


def _merged(path: Path) -> str:
    """A name for the file that its shards are merged into."""
    return re.sub(r"-\d+-of-\d+$", "", path.stem) + ".gguf"


def _tokenizer(file: _File) -> dict:
    """The content of a tokenizer.json."""
    kind, cut = (file.values.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    cut = {None: "gpt-2", "default": "gpt-2"}.get(cut, cut)
    if kind in ("llama", "t5"):
        raise UserError(
            f"{file.path} has a tokenizer of kind {kind!r}, which is SentencePiece, as Llama 2,"
            " TinyLlama and Mistral have: bits per byte need a byte-level BPE, so convert import"
            " reads models with one, as SmolLM and SmolLM2 are"
        )
    if kind != "gpt2" or cut not in PRE_TOKENIZERS:
        raise UserError(
            f"{file.path} has a tokenizer of kind {kind!r}, cut as {cut!r}: convert import reads"
            f" byte-level BPE ('gpt2') that is cut as {' or '.join(map(repr, PRE_TOKENIZERS))}"
        )
    tokens = file.values["tokenizer.ggml.tokens"]
    types = file.values.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": file.values["tokenizer.ggml.merges"],
    }
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[cut],
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": model,
    }


def write_tokenizer(content: dict, path: Path) -> None:
    """Writes a tokenizer.json."""
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
