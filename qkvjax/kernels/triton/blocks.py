"""Tile sizes of the Triton kernels, and what heads and sequences have to be for them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

WIDTHS = (16, 32, 64, 128, 256)  # of the kernels; other heads are padded with zeros
SUPPORTED_WIDTHS = range(8, 257, 8)
DTYPES = ("float32", "bfloat16", "float16")
NARROWEST = 16  # the smallest side of a matrix product


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes, and what Triton is given: warps of a program, stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# By (head width, whether the keys are the values): the fastest on an H200 of those that fit it
# (benchmarks/results/h200/tiles.jsonl, by benchmarks/kernel_speed.py). Narrower heads take 64's.
FORWARD = {
    (64, False): Blocks(64, 64, 4, 3),
    (64, True): Blocks(64, 64, 4, 3),
    (128, False): Blocks(128, 64, 4, 2),
    (128, True): Blocks(64, 64, 4, 2),
    (256, False): Blocks(64, 64, 4, 3),
    (256, True): Blocks(128, 64, 8, 4),
}
KEYS = {
    (64, False): Blocks(64, 64, 4, 3),
    (64, True): Blocks(64, 128, 4, 3),
    (128, False): Blocks(64, 64, 4, 2),
    (128, True): Blocks(64, 64, 4, 3),
    (256, False): Blocks(64, 64, 8, 2),
    (256, True): Blocks(64, 128, 8, 2),
}
QUERIES = {
    (64, False): Blocks(64, 128, 4, 3),
    (64, True): Blocks(128, 64, 4, 3),
    (128, False): Blocks(128, 64, 8, 3),
    (128, True): Blocks(64, 64, 4, 2),
    (256, False): Blocks(128, 32, 8, 3),
    (256, True): Blocks(64, 64, 4, 3),
}


def pad_to_width(x: Float[Array, "B T N H"]) -> Float[Array, "B T N _"]:
    """Returns heads with zeros up to the next of WIDTHS; they change no score and no value."""
    width = next((size for size in WIDTHS if size >= x.shape[-1]), x.shape[-1])
    if width == x.shape[-1]:
        return x
    return jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])])


def pad_second_part(x: Float[Array, "*lead P"]) -> Float[Array, "*lead _"]:
    """Returns [B, T, N, P] with zeros up to a P that a matrix product can have."""
    width = max(NARROWEST, pl.next_power_of_2(x.shape[-1]))
    return jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])])


def score_parts(x: jax.Array, second: jax.Array | None) -> tuple[jax.Array, ...]:
    """Returns the parts of queries or keys whose products are summed to the scores."""
    return (x,) if second is None else (x, pad_second_part(second.astype(x.dtype)))
