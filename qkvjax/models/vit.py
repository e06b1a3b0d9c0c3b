"""The vision transformer (Dosovitskiy et al. 2021): patches behind a class token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from qkvjax.models.encoder import Encoder
from qkvjax.models.spec import ModelSpec


class VisionTransformer(Encoder):
    """Patches of an image, float [B, P, numbers of a patch], to classes [B, 1, classes].

    The stack's T = P + 1 tokens start with a learned class token, zero at first, which the head
    reads.
    """

    POSITION_STD = 0.02

    def __init__(self, spec: ModelSpec, *, key):
        super().__init__(spec, key=key)
        self.class_token = nnx.Param(jnp.zeros(spec.d_model))

    def tokens(self, inputs, dtype) -> jax.Array:
        patches = super().tokens(inputs, dtype)
        room = jnp.pad(patches, ((0, 0), (1, 0), (0, 0)))
        is_class = (jnp.arange(room.shape[1]) == 0)[:, None]
        return jnp.where(is_class, self.class_token[...].astype(dtype), room)
