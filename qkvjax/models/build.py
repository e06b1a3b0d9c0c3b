"""The model that a spec stands for."""

from __future__ import annotations

import jax
from flax import nnx

from qkvjax.models.encoder import Encoder, VisionTransformer
from qkvjax.models.lm import LanguageModel
from qkvjax.models.spec import ModelSpec

MODELS = {"lm": LanguageModel, "encoder": Encoder, "vit": VisionTransformer}


def make(spec: ModelSpec, key: jax.Array) -> nnx.Module:
    """A model with the initial values that follow from `key`; for use inside a compiled program
    or `jax.eval_shape`."""
    return MODELS[spec.kind](spec, key=key)


def build(spec: ModelSpec, seed: int = 0) -> nnx.Module:
    """A model with initial values, compiled as one program."""
    return jax.jit(lambda key: make(spec, key))(jax.random.key(seed))


def count(model) -> int:
    """Numbers in the leaves that are really there."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))
