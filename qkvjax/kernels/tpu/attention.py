"""Attention in Pallas for TPUs, through Mosaic: arguments and forward pass.

One output tile stays in VMEM while the tiles of keys that it needs pass by (`tpu.grid`):

    VMEM                                          one step, for tile j of keys
      Q_i                     stays for all steps   S = Q_i K_j^T, masked
      row_max, row_sum [r, 1] scratch, float32      online softmax: P, and new row_max, row_sum
      acc [r, H]              scratch, float32      acc = acc * rescale + P V_j
      K_j, V_j                this step's           first step: the scratch is set to zero before
      K_j+1, V_j+1            being copied          last step: out_i and lse_i are written

`v=None` says that the key tile is the value tile: it is copied to the core once.

Scores may have several parts, as in kernels.triton. Letters: B sequences, T positions, N query
heads, K key-value heads, G = N/K, H head width, P width of the second part.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as lowering
from jaxtyping import Array, Float, Int

from qkvjax.errors import UserError
from qkvjax.kernels import limits, tile
from qkvjax.kernels.tpu import backward as tpu_backward
from qkvjax.kernels.tpu.grid import (
    LANES,
    Blocks,
    Options,
    both_ways,
    pallas,
    queries_walk,
    segment_specs,
    tile_mask,
    transposed,
)

WIDTHS = range(8, 513, 8)
DTYPES = ("float32", "bfloat16")


# By the most bytes of a head: sizes that fit the 16 MB that a kernel gets of a v5e's VMEM, whatever
# the options. Neither tuned nor timed.
FORWARD = {512: Blocks(1024, 512), 2048: Blocks(512, 512)}
BACKWARD = {256: Blocks(512, 1024), 1024: Blocks(512, 512), 2048: Blocks(256, 256)}


def refusal(q, v=None, **_) -> str | None:
    """Returns why these kernels do not support these arguments; None where they do."""
    return limits.refusal(q, v, WIDTHS, DTYPES)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"] | None = None,
    *,
    causal: bool = True,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    q_pe: Float[Array, "B T N P"] | None = None,
    k_pe: Float[Array, "B T K P"] | None = None,
    blocks: Blocks | None = None,
    interpret: bool | lowering.InterpretParams = False,
) -> Float[Array, "B T N _"]:
    """Computes `kernels.dispatch.attention`, whose arguments these are.

    Args:
      blocks: tile sizes of every kernel; None takes this file's.
      interpret: run on any machine, slowly.

    Raises:
      UserError: for the reason that `refusal` returns, or a block is not a multiple of 128.
    """
    reason = refusal(q, v)
    if reason:
        raise UserError(
            f"the tpu kernel does not support these arguments: {reason}; use impl='auto'"
        )
    length = q.shape[1]
    width = q.shape[-1]
    value_width = (k if v is None else v).shape[-1]
    head_bytes = max(width, value_width) * q.dtype.itemsize
    options = Options(
        causal=causal,
        window=window,
        scale=width**-0.5 if scale is None else float(scale),
        length=length,
        forward=_fit(blocks, FORWARD, head_bytes, length),
        backward=_fit(blocks, BACKWARD, head_bytes, length),
        interpret=interpret,
    )
    sizes = (
        options.forward.queries,
        options.forward.keys,
        options.backward.queries,
        options.backward.keys,
    )
    fill = -length % math.lcm(*sizes)

    def by_head(x):  # [B, T, N, H] -> [B, N, T, H] with whole tiles
        return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, fill), (0, 0)])

    qs, ks, v = jax.tree.map(by_head, (_score_parts(q, q_pe), _score_parts(k, k_pe), v))
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids.astype(jnp.int32), [(0, 0), (0, fill)])
    return jnp.swapaxes(_attend(options, qs, ks, v, segment_ids)[:, :, :length], 1, 2)


def _fit(blocks: Blocks | None, defaults: dict, head_bytes: int, length: int) -> Blocks:
    """Returns tile sizes that are not longer than the sequence; raises as `attention` does."""
    chosen = blocks or next(sizes for most, sizes in defaults.items() if head_bytes <= most)
    for size in (chosen.queries, chosen.keys):
        if size <= 0 or size % LANES:
            raise UserError(
                f"a block of {size} does not fit the tpu kernel: use multiples of {LANES}"
            )
    longest = -(-length // LANES) * LANES
    return Blocks(min(chosen.queries, longest), min(chosen.keys, longest))


def _score_parts(x, second):
    """Returns the parts of queries or keys whose products are summed to the scores."""
    return (x,) if second is None else (x, second.astype(x.dtype))


# ---- forward ----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, qs, ks, v, segments):
    return _forward(options, qs, ks, v, segments)[0]


def _forward(options, qs, ks, v, segments):
    """Returns (attention [B, N, T, H], the residuals of the backward pass).

    The lse among them is float32 [B, N, 1, T], in base 2.
    """
    batch, heads, length, _ = qs[0].shape
    group = heads // ks[0].shape[1]
    blocks = options.forward
    values = ks[0] if v is None else v
    out = jax.ShapeDtypeStruct((*qs[0].shape[:3], values.shape[-1]), qs[0].dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)
    rows, columns = queries_walk(blocks, group)
    call = pallas(
        functools.partial(_forward_kernel, options),
        "attention_forward",
        options.interpret,
        options.ends(blocks, qs, segments),
        grid=(batch, heads, length // blocks.queries, options.steps(blocks.queries, blocks.keys)),
        in_specs=tile.block_specs((qs, rows.tile), (ks, columns.tile), (v, columns.tile))
        + segment_specs(segments, rows, columns),
        out_specs=[rows.tile(out), rows.numbers(lse)],
        out_shape=[out, lse],
        scratch_shapes=[
            lowering.VMEM((blocks.queries, 1), jnp.float32),  # row_max
            lowering.VMEM((blocks.queries, 1), jnp.float32),  # row_sum
            lowering.VMEM((blocks.queries, values.shape[-1]), jnp.float32),  # acc
        ],
    )
    out, lse = call(qs, ks, v, *both_ways(segments))
    return out, (qs, ks, v, segments, out, lse)


def _forward_kernel(
    options,
    begins,
    ends,
    qs,
    ks,
    v,
    row_segments,
    column_segments,
    out,
    lse,
    row_max,
    row_sum,
    acc,
):
    """Takes one step of one tile of queries; see the picture of this module."""
    blocks = options.forward
    b, i, step = (pl.program_id(axis) for axis in (0, 2, 3))
    j = begins[b, i] + step

    @pl.when(step == 0)
    def _start():
        row_max[...] = jnp.full(row_max.shape, tile.MASKED, jnp.float32)
        row_sum[...] = jnp.zeros(row_sum.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    # Steps behind the end have the last tile once more, which must not count twice.
    @pl.when(j < ends[b, i])
    def _step():
        k = [ref[...] for ref in ks]
        scores = tile.scores([ref[...] for ref in qs], k)
        # Every tile is masked: full tiles are not told apart here.
        mask = tile_mask(options, i, j, blocks, row_segments, column_segments)
        values = k[0] if v is None else v[...]
        state = row_max[:, 0], row_sum[:, 0], [acc[...]]
        new_max, new_sum, [new_acc] = tile.accumulate(state, scores, mask, [values], options.scale)
        row_max[...] = new_max[:, None]
        row_sum[...] = new_sum[:, None]
        acc[...] = new_acc

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        # Rows that pad the sequence may see no key. Their sum is 0.
        divisor = jnp.maximum(row_sum[...], 1e-30)
        out[...] = (acc[...] / divisor).astype(out.dtype)
        # A row in memory: a column would take 128 times its bytes.
        lse[...] = transposed(row_max[...] + jnp.log2(divisor))


# ---- backward ---------------------------------------------------------------------------------


def _backward(options, residuals, d_out):
    qs, ks, v, segments, out, lse = residuals
    products = out.astype(jnp.float32) * d_out.astype(jnp.float32)
    delta = options.scale * jnp.sum(products, axis=-1)[:, :, None]
    d_ks, d_v = tpu_backward.keys_pass(options, qs, ks, v, segments, d_out, lse, delta)
    d_qs = tpu_backward.queries_pass(options, qs, ks, v, segments, d_out, lse, delta)
    return d_qs, d_ks, d_v, None


_attend.defvjp(_forward, _backward)
