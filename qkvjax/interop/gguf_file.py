"""One GGUF file: its keys, its tensors as float32, and errors that name the file."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qkvjax.errors import UserError

# Keys for what our model does not compute, with the values that switch it off.
_OFF = {
    "expert_count": (0,),
    "rope.scaling.type": ("none",),
    "attention.sliding_window": (0,),
    "attention.logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "attention.scale": (0,),
}


class GgufFile:
    """A GGUF file with a model of Llama's architecture.

    Args:
      path: of the file, for messages.
      reader: a `gguf.GGUFReader` of it.
      dequantize: `gguf.dequantize`.

    Attributes:
      values: every key of the file and its value.
      tensors: every tensor of the file by name.
      matrix_types: quantisation types of the matrices that were read, such as "Q8_0".
    """

    def __init__(self, path: Path, reader, dequantize: Callable):
        self.path = path
        self.values = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.matrix_types: set[str] = set()
        self._dequantize = dequantize
        self._read: set[str] = set()

    def get(self, name: str, default=None):
        """Returns the value of the key `llama.NAME`."""
        return self.values.get(f"llama.{name}", default)

    def whole(self, name: str, default: int | None = None) -> int:
        """Returns the value of `llama.NAME`; raises UserError if it is not a positive integer."""
        value = self.get(name, default)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{self.path}: llama.{name} is {value!r}, and must be a whole number")
        return value

    def check(self) -> None:
        """Raises UserError for a shard, another architecture, or a feature that ours lacks."""
        num_shards = self.values.get("split.count", 1)
        if isinstance(num_shards, int) and num_shards > 1:
            number = int(self.values.get("split.no", 0)) + 1
            raise UserError(
                f"{self.path} is shard {number} of {num_shards} of a model: merge them with"
                f" llama-gguf-split --merge FIRST_SHARD {_merged_name(self.path)}, and import that"
            )
        architecture = self.values.get("general.architecture")
        if architecture != "llama":
            raise UserError(
                f"{self.path} has a model of architecture {architecture!r}: convert import reads"
                " 'llama' with a byte-level BPE (SmolLM, SmolLM2 and others of that form)"
            )
        for name, off in _OFF.items():
            if self.get(name, off[0]) not in off:
                raise UserError(
                    f"{self.path} has llama.{name}={self.get(name)!r}, which our model does not"
                    " compute: convert import reads models without it"
                )

    def array(self, name: str, *shape: int) -> np.ndarray:
        """Returns the tensor `NAME.weight` in float32.

        Raises:
          UserError: the file does not have it, it has another shape, or its quantisation type is
            not implemented by the installed gguf.
        """
        tensor = self.tensors.get(f"{name}.weight")
        if tensor is None:
            raise UserError(f"{self.path} has no tensor {name}.weight: copy it again")
        self._read.add(tensor.name)
        kind = tensor.tensor_type.name
        try:
            array = np.asarray(self._dequantize(tensor.data, tensor.tensor_type), np.float32)
        except RuntimeError as error:  # of a type that the library does not implement
            raise UserError(
                f"{self.path}: {tensor.name} is quantised as {kind}, which the installed gguf"
                f" {importlib.metadata.version('gguf')} cannot widen ({error}): pip install"
                " --upgrade gguf, or take the model in another quantisation, such as Q8_0 or F16"
            ) from None
        if array.shape != shape:
            raise UserError(
                f"{self.path}: {tensor.name} has shape {array.shape}, where {shape} is expected"
            )
        if len(shape) == 2:
            self.matrix_types.add(kind)
        return array

    def check_all_read(self) -> None:
        """Raises UserError if a tensor of the file was not read: the model would be another."""
        if unknown := sorted(self.tensors.keys() - self._read):
            raise UserError(
                f"{self.path} has tensors that our model does not have, the first {unknown[0]!r}:"
                " convert import reads Llama's architecture without biases and other additions"
            )


def _merged_name(path: Path) -> str:
    """Returns a name for the file that the shards of `path` are merged into."""
    return re.sub(r"-\d+-of-\d+$", "", path.stem) + ".gguf"
