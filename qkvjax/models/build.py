"""Builds the model that a spec describes."""

from __future__ import annotations

import jax
from flax import nnx

from qkvjax.models.encoder import Encoder, VisionTransformer
from qkvjax.models.lm import LanguageModel
from qkvjax.models.spec import ModelSpec

MODELS = {"lm": LanguageModel, "encoder": Encoder, "vit": VisionTransformer}


def make(spec: ModelSpec, key: jax.Array) -> nnx.Module:
    """Returns a model whose initial values follow from `key`.

    For use inside a compiled program or `jax.eval_shape`; `build` compiles it.
    """
    return MODELS[spec.kind](spec, key=key)


def build(spec: ModelSpec, seed: int = 0) -> nnx.Module:
    """Returns a model with initial values, which one compiled program computes."""
    return jax.jit(lambda key: make(spec, key))(jax.random.key(seed))


def count(model) -> int:
    """Returns how many numbers the arrays of a model have together."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))
