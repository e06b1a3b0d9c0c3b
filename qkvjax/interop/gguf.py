"""Reads models of Llama's architecture from GGUF files, the format of llama.cpp.

All numbers become float32, whatever they were quantised to. Two conventions differ from ours:

- llama.cpp rotates neighbours, (0, 1), (2, 3), ..., and orders the rows of W_q and W_k for that. We
  rotate halves, (0, H/2), (1, H/2 + 1), ..., as the checkpoints do that the files were made from.
- The file's norms add `layer_norm_rms_epsilon` to the mean square, ours NORM_EPSILON. Scaling the
  residual stream by c = sqrt(NORM_EPSILON / epsilon) makes both models the same: the embedding and
  both output maps of each layer are multiplied by c. Where the embedding is also the head, the gain
  of the last norm is divided by c.

Letters: D model width, N query heads, K key-value heads, H head width, F feed-forward width,
V vocabulary, L layers.
"""

from __future__ import annotations

import importlib.metadata
import json
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qkvjax.data.compression import first_bytes
from qkvjax.data.formats import HEAD, identify
from qkvjax.errors import UserError
from qkvjax.interop.gguf_file import GgufFile
from qkvjax.interop.gguf_tokenizer import tokenizer_json
from qkvjax.kernels.stored import NORM_EPSILON
from qkvjax.models.spec import scan_period

D_FF_MULTIPLE = 8  # of the feed-forward widths that our model has
# Arrays of a layer: our name -> the name in the file.
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
      fields: fields of the group `model` of a config.
      context: tokens of the longest sequence that it was made for.
      arrays: in float32, by their names in checkpoints without "model.".
      tokenizer: content of a tokenizer.json.
      quantization: types of the matrices in the file, such as "Q4_1, Q8_0".
    """

    fields: dict
    context: int
    arrays: dict[str, np.ndarray]
    tokenizer: dict
    quantization: str


def read(path: str | Path) -> Imported:
    """Reads a GGUF file.

    Raises:
      UserError: the file does not exist, is damaged or truncated, has another architecture, or
        describes a model that ours cannot be equal to.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need an extra package: pip install qkvjax[gguf]") from None
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: give --source a .gguf file")
    try:
        file = GgufFile(path, gguf.GGUFReader(path), gguf.dequantize)
        file.check()
        return _model(file)
    except (ValueError, IndexError, KeyError, TypeError, ArithmeticError, struct.error) as error:
        raise _unreadable(path, error) from None


def write_tokenizer(content: dict, path: Path) -> None:
    """Writes a tokenizer.json."""
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _unreadable(path: Path, error: Exception) -> UserError:
    """Returns the error for a file that the library cannot read."""
    if "GGMLQuantizationType" in str(error) or "which we cannot handle" in str(error):
        return UserError(
            f"{path} is newer than the installed gguf {importlib.metadata.version('gguf')}"
            f" ({error}): pip install --upgrade gguf, or take the model in another quantisation,"
            " such as Q8_0 or F16"
        )
    message = f"{path} is damaged, truncated or not a GGUF file ({type(error).__name__}: {error})"
    head = first_bytes(path, HEAD)
    if head and not head.startswith(b"GGUF"):
        return UserError(f"{message}: it is {identify(head).name}; give --source a .gguf file")
    return UserError(f"{message}: copy it again")


class _Sizes(NamedTuple):
    """Sizes of the model.

    Attributes:
      d_model: D.
      num_layers: L.
      num_heads: N.
      num_kv_heads: K.
      head_dim: H.
      rotary_dim: numbers of a head that are rotated, from its first on.
      d_ff: F.
      scale: c, by which the residual stream is scaled (see the module's docstring).
    """

    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    d_ff: int
    scale: np.float32

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each array of a layer, by its name in the file."""
        d = self.d_model
        q_width = self.num_heads * self.head_dim
        kv_width = self.num_kv_heads * self.head_dim
        return {
            "attn_norm": (d,),
            "attn_q": (q_width, d),
            "attn_k": (kv_width, d),
            "attn_v": (kv_width, d),
            "attn_output": (d, q_width),
            "ffn_norm": (d,),
            "ffn_gate": (self.d_ff, d),
            "ffn_up": (self.d_ff, d),
            "ffn_down": (d, self.d_ff),
        }


def _sizes(file: GgufFile) -> _Sizes:
    num_layers = file.whole("block_count")
    d_model = file.whole("embedding_length")
    num_heads = file.whole("attention.head_count")
    num_kv_heads = file.whole("attention.head_count_kv", num_heads)
    head_dim = file.whole("attention.key_length", d_model // num_heads)
    d_ff = file.whole("feed_forward_length")
    if d_ff % D_FF_MULTIPLE:
        raise UserError(
            f"{file.path}: the feed-forward width {d_ff} is not a multiple of {D_FF_MULTIPLE}:"
            " convert import reads models where it is"
        )
    epsilon = file.get("attention.layer_norm_rms_epsilon", 1e-5)
    return _Sizes(
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=file.whole("rope.dimension_count", head_dim),
        d_ff=d_ff,
        scale=np.float32((NORM_EPSILON / epsilon) ** 0.5),
    )


def _model(file: GgufFile) -> Imported:
    # The tokenizer first: it refuses a file at once, and arrays may take minutes.
    tokenizer = tokenizer_json(file)
    sizes = _sizes(file)
    arrays = _layer_arrays(file, sizes) | _other_arrays(file, sizes)
    file.check_all_read()
    fields = {
        "kind": "lm",
        "d_model": sizes.d_model,
        "num_layers": sizes.num_layers,
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "sharing": "q-k-v",
        "position": "rope",
        "rotary_fraction": sizes.rotary_dim / sizes.head_dim,
        "rotary_base": float(file.get("rope.freq_base", 1e4)),
        "qk_norm": False,
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "mlp_ratio": sizes.d_ff / sizes.d_model,
        "tie_embeddings": "head.weight" not in arrays,
        "init": "normal",
    }
    quantization = ", ".join(sorted(file.matrix_types))
    return Imported(fields, file.whole("context_length"), arrays, tokenizer, quantization)


def _layer_arrays(file: GgufFile, sizes: _Sizes) -> dict[str, np.ndarray]:
    """Returns the arrays of all layers, stacked as the model scans over them."""
    period = scan_period((None,) * sizes.num_layers)  # all layers are alike
    arrays = {}
    for ours, name in _LAYER.items():
        for first in range(period):
            numbers = range(first, sizes.num_layers, period)
            layers = [_layer_array(file, sizes, number, name) for number in numbers]
            arrays[f"stack.blocks.{first}.{ours}"] = np.stack(layers)
    return arrays


def _layer_array(file: GgufFile, sizes: _Sizes, number: int, name: str) -> np.ndarray:
    """Returns one array of one layer: a gain [D], or a matrix [inputs, outputs]."""
    array = file.array(f"blk.{number}.{name}", *sizes.shapes()[name])
    if name in ("attn_q", "attn_k"):
        array = _rows_for_halves(array, sizes.head_dim, sizes.rotary_dim)
    if name in ("attn_output", "ffn_down"):
        array = array * sizes.scale
    return array.T  # the file has [outputs, inputs]


def _rows_for_halves(rows: np.ndarray, head_dim: int, rotary_dim: int) -> np.ndarray:
    """Reorders the rows of W_q or W_k from rotating neighbours to rotating halves.

    In each head the rows 0, 1, 2, 3, ... become 0, 2, ..., 1, 3, ...; rows that are not rotated
    stay.

    Args:
      rows: [heads * H, D].
      head_dim: H.
      rotary_dim: how many rows of each head are rotated.
    """
    by_head = rows.reshape(-1, head_dim, rows.shape[1])
    rotated = by_head[:, :rotary_dim]
    halves = [rotated[:, 0::2], rotated[:, 1::2], by_head[:, rotary_dim:]]
    return np.concatenate(halves, axis=1).reshape(rows.shape)


def _other_arrays(file: GgufFile, sizes: _Sizes) -> dict[str, np.ndarray]:
    """Returns embedding, last norm, and the head where it is not the embedding."""
    num_tokens = len(file.values["tokenizer.ggml.tokens"])
    embedding = file.array("token_embd", num_tokens, sizes.d_model)
    gain = file.array("output_norm", sizes.d_model)
    arrays = {"embedding": embedding * sizes.scale}
    if "output.weight" not in file.tensors:
        return arrays | {"norm.gain": gain / sizes.scale}
    head = file.array("output", num_tokens, sizes.d_model)
    return arrays | {"norm.gain": gain, "head.weight": head.T}
