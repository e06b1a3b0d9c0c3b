"""Attention in Pallas for NVIDIA's Hopper GPUs, through Mosaic: arguments and forward pass.

A block has three warpgroups (`block`). Warpgroups 0 and 1 hold a tile of queries each, of the same
head, and walk over the same tiles of keys. Warpgroup 2 copies those tiles into a ring of slots:

    shared memory                                        registers of warpgroups 0 and 1
      q[0], q[1]     tiles of queries, loaded once         row_max, row_sum [r], acc [r, H]
      keys[slots]    ring of K_j                           scores, weights [r, c] of one tile
      values[slots]  ring of V_j; absent where K = V

With `v=None` a slot holds one tile, which serves both products, so that twice as many slots fit.

The tensor cores should not idle while softmax runs on the other units, so the two warpgroups
alternate (FlashAttention-3, Shah et al. 2024, "ping-pong"). QK is the product that makes scores,
PV the one that adds to acc, and | a phase of the barrier `schedule`, at which both arrive:

    time ->
    warpgroup 0  QK_0 | softmax_0 | PV_0 QK_1 | softmax_1 | PV_1 QK_2 | ...
    warpgroup 1       | QK_0      | softmax_0 | PV_0 QK_1 | softmax_1 | ...
    warpgroup 2  copies K_j and V_j into slots as these become free

Warpgroup 1 has one phase more at its start, and warpgroup 0 one more at its end. So the phase in
which a warpgroup has started QK is the phase in which the other one is done with its softmax.

Letters: B sequences, T positions, N query heads, K key-value heads, H head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as lowering
from jaxtyping import Array, Float, Int

from qkvjax.errors import UserError
from qkvjax.kernels import limits, tile
from qkvjax.kernels.hopper import backward as hopper_backward
from qkvjax.kernels.hopper import block as hopper_block
from qkvjax.kernels.hopper.block import Blocks, Warpgroup, barriers, slot_of
from qkvjax.kernels.triton import backward as triton_backward
from qkvjax.kernels.triton import blocks as triton_blocks
from qkvjax.kernels.triton.grid import Options

WIDTHS = (64, 128, 256)
DTYPES = ("bfloat16", "float16")


# By (head width, whether the keys are the values): the fastest on an H200
# (benchmarks/results/h200/tiles.jsonl). What is missing here goes through Triton, which is faster
# there.
FORWARD = {
    (64, False): Blocks(64, 128, 2),
    (64, True): Blocks(64, 128, 3),
    (128, False): Blocks(64, 128, 2),
    (128, True): Blocks(64, 128, 2),
    (256, False): Blocks(64, 64, 2),
    (256, True): Blocks(64, 128, 2),
}
KEYS = {
    (64, False): Blocks(128, 64, 3),
    (64, True): Blocks(128, 64, 2),
    (128, False): Blocks(64, 64, 2),
    (128, True): Blocks(128, 64, 2),
    (256, True): Blocks(64, 64, 2),
}
QUERIES = {
    (64, False): Blocks(64, 128, 2),
    (64, True): Blocks(64, 128, 4),
    (128, False): Blocks(64, 64, 4),
    (128, True): Blocks(64, 64, 2),
}


def refusal(q, v=None, *, q_pe=None, **_) -> str | None:
    """Returns why this kernel does not support these arguments; None where it does."""
    if v is not None and v.shape[-1] != q.shape[-1]:
        return "values must be as wide as keys"
    return limits.refusal(q, v, WIDTHS, DTYPES, {"a second part of the scores": q_pe})


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"] | None = None,
    *,
    causal: bool = True,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    q_pe: Float[Array, "B T N P"] | None = None,
    k_pe: Float[Array, "B T K P"] | None = None,
    forward: Blocks | None = None,
    backward: Blocks | None = None,
    interpret: object = None,
) -> Float[Array, "B T N H"]:
    """Computes `kernels.dispatch.attention`, whose arguments these are.

    Args:
      forward, backward: tile sizes; None takes this file's.
      interpret: `InterpretGPUParams`, to run on any machine from jax 0.11 on, slowly.

    Raises:
      UserError: for the reason that `refusal` returns.
    """
    reason = refusal(q, v, q_pe=q_pe)
    if reason:
        raise UserError(f"the hopper kernel does not support these arguments: {reason}")
    length = q.shape[1]
    width = q.shape[-1]
    kind = width, v is None
    forward = forward or FORWARD[kind]
    of_keys = backward or KEYS.get(kind, triton_blocks.KEYS[kind])
    of_queries = backward or QUERIES.get(kind, triton_blocks.QUERIES[kind])
    options = Options(
        causal=causal,
        window=window,
        scale=width**-0.5 if scale is None else float(scale),
        length=length,
        forward=forward,
        backward=(of_keys, of_queries),
        interpret=interpret,
    )
    # A block holds two tiles of queries, or of keys.
    step = 2 * max(max(sizes.queries, sizes.keys) for sizes in (forward, of_keys, of_queries))
    arrays = tile.padded((q, k, v, segment_ids), length, step)
    return _attend(options, *arrays)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, segments):
    return _forward(options, q, k, v, segments)[0]


def _forward(options, q, k, v, segments):
    out, lse = forward_pass(options, q, k, v, segments)
    return out, (q, k, v, segments, out, lse)


def _backward(options, residuals, d_out):
    q, k, v, segments, out, lse = residuals
    rest = v, segments, d_out, lse, tile.delta(out, d_out, options.scale)
    of_keys, of_queries = options.backward
    if isinstance(of_keys, Blocks):
        dk, dv = hopper_backward.keys_pass(options, q, k, *rest)
    else:
        [dk], dv = triton_backward.keys_pass(options, (q,), (k,), *rest)
    if isinstance(of_queries, Blocks):
        dq = hopper_backward.queries_pass(options, q, k, *rest)
    else:
        [dq] = triton_backward.queries_pass(options, (q,), (k,), *rest)
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


# ---- forward ----------------------------------------------------------------------------------


def forward_pass(options: tile.Options, q, k, v, segments) -> tuple[jax.Array, jax.Array]:
    """Returns (attention [B, T, N, H], its lse float32 [B, N, T] in base 2) of padded sequences.

    `options.forward` is a `block.Blocks`; T is a multiple of two tiles of queries and of a tile of
    keys.
    """
    batch, length, heads, width = q.shape
    blocks = options.forward
    rows = 2 * blocks.queries  # of a block: both warpgroups walk over the same tiles of keys
    ranges = tile.ranges(rows, blocks.keys, length, segments=segments, **options.mask_rules)
    smem = functools.partial(hopper_block.tiles, width=width, dtype=q.dtype)
    num_rings = 1 if v is None else 2
    scratch = {
        "q_tiles": smem(2, blocks.queries),
        "lse_rows": lowering.SMEM((2, blocks.queries), jnp.float32),
        "key_ring": smem(blocks.slots, blocks.keys),
        "value_ring": None if v is None else smem(blocks.slots, blocks.keys),
        "arrived": barriers(2),
        "full": [barriers(blocks.slots) for _ in range(num_rings)],
        # A slot is free when both computing warpgroups released it.
        "free": [barriers(blocks.slots, arrivals=2) for _ in range(num_rings)],
        "schedule": barriers(1, arrivals=2),
    }
    return hopper_block.launch(
        functools.partial(
            _kernel, options, options.masked_ends(length, segments), heads // k.shape[2]
        ),
        "attention_hopper_forward",
        (ranges, q, k, v, segments),
        [
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        scratch,
        {"head": heads, "sequence": batch, "tile": length // rows},
        options.interpret,
    )


def _kernel(
    options,
    masked_ends,
    group,
    inputs,
    outputs,
    *,
    q_tiles,
    lse_rows,
    key_ring,
    value_ring,
    arrived,
    full,
    free,
    schedule,
):
    """Computes two tiles of queries of one head; see the picture of this module."""
    ranges, q, k, v, segments = inputs
    out, lse = outputs
    blocks = options.forward
    head, sequence, warpgroup = (
        jax.lax.axis_index(name) for name in ("head", "sequence", "warpgroup")
    )
    i = hopper_block.last_first("tile")
    tile_range = hopper_block.range_of(ranges, sequence, i)
    begin = tile_range[0]
    end = tile_range[3]
    warps = Warpgroup(options.interpret)

    def change_places():
        """Passes one phase of `schedule`: arrives and waits until the other warpgroup arrived."""
        lowering.barrier_arrive(schedule)
        lowering.barrier_wait(schedule)

    @pl.when(warpgroup < 2)
    def _compute():
        lowering.set_max_registers(hopper_block.COMPUTE_REGISTERS, action="increase")
        first = (2 * i + warpgroup) * blocks.queries
        rows = sequence, pl.ds(first, blocks.queries), head
        q_tile = q_tiles.at[warpgroup]
        lowering.copy_gmem_to_smem(q.at[rows], q_tile, arrived.at[warpgroup])
        # Every product reads the tile of queries.
        lowering.barrier_wait(arrived.at[warpgroup])

        def step(j, state, masked):
            row_max, row_sum, acc = state
            slot = slot_of(j - begin, blocks.slots)
            # K_j has landed (and with K = V so has V_j).
            lowering.barrier_wait(full[0].at[slot])
            # QK is started, and runs while this warpgroup waits for the other one to finish its
            # softmax. From then on the tensor cores are the other one's.
            [scores] = warps.products((q_tile, key_ring.at[slot]), then=change_places)
            if v is not None:
                # The scores are complete: K_j is not needed again. With K = V it is, for PV.
                warps.release(free[0].at[slot])
            mask = None
            if masked:
                positions = first, j * blocks.keys
                mask = warps.mask(options, positions, scores.shape, segments, sequence)
            row_max, rescale, weights = tile.online_softmax(row_max, scores, mask, options.scale)
            acc = acc * tile.along_rows(rescale, acc)
            narrow = weights.astype(q.dtype)
            row_sum = row_sum * rescale + jnp.sum(weights, axis=1)
            # All of the softmax comes before the arrival: otherwise the compiler could move a part
            # of it to where this warpgroup should keep the tensor cores busy.
            row_max, row_sum, acc, narrow = warps.computed_here(row_max, row_sum, acc, narrow)
            # Done with the softmax: the other warpgroup, which has started its QK, may begin its
            # own.
            lowering.barrier_arrive(schedule)
            if v is not None:
                # V_j has landed; it had the time of QK and softmax for that.
                lowering.barrier_wait(full[1].at[slot])
            # The other warpgroup has started its QK: the tensor cores are this one's, for PV and
            # for the QK of the next step.
            lowering.barrier_wait(schedule)
            value = (key_ring if v is None else value_ring).at[slot]
            [acc] = warps.add((acc, (narrow, value)))
            # PV is complete, so the slot may be filled again.
            warps.release(free[-1].at[slot])
            return row_max, row_sum, acc

        # Warpgroup 1 starts one phase later: it waits until warpgroup 0 has started its first QK.
        pl.when(warpgroup == 1)(change_places)
        zeros = warps.zeros(blocks.queries)
        start = zeros + tile.MASKED, zeros, warps.zeros(blocks.queries, q.shape[-1])
        row_max, row_sum, acc = tile.walk(tile_range, step, start, masked_ends)
        # ... and ends one phase later: its last arrival needs a partner.
        pl.when(warpgroup == 0)(change_places)
        # Rows that pad the sequence may see no key. Their sum is 0.
        row_sum = jnp.maximum(row_sum, 1e-30)
        lse_at = sequence, head, pl.ds(first, blocks.queries)
        # The output goes out through the tile of queries, which nothing reads any more.
        hopper_block.write(
            (q_tile, acc / tile.along_rows(row_sum, acc), out.at[rows]),
            (
                lse_rows.at[warpgroup],
                row_max + jnp.log(row_sum) * tile.LOG2E,
                lse.at[lse_at],
            ),
        )

    @pl.when(warpgroup == 2)
    def _feed():
        lowering.set_max_registers(hopper_block.FEED_REGISTERS, action="decrease")
        kv_head = jax.lax.div(head, jnp.array(group, head.dtype))

        def copy(step, slot):
            at = sequence, pl.ds((begin + step) * blocks.keys, blocks.keys), kv_head
            lowering.copy_gmem_to_smem(k.at[at], key_ring.at[slot], full[0].at[slot])
            if v is not None:
                # A barrier of its own: QK need not wait for V_j.
                lowering.copy_gmem_to_smem(v.at[at], value_ring.at[slot], full[1].at[slot])

        hopper_block.feed(end - begin, blocks.slots, free, copy)
