"""Attention in Pallas for NVIDIA's Hopper GPUs, through Mosaic.

A block has three warpgroups. Two compute, a tile of queries each; the third copies the tiles of
keys and values that both need into a ring of slots in shared memory, and fills a slot anew once
both are done with it. The two take turns: while one has the tensor cores, the other computes its
softmax (FlashAttention-3, Shah et al. 2024). With `v=None` a slot holds one tile, for two products,
so that twice as many slots fit.

Letters: B sequences, T places, N query heads, K key-value heads, H head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as lowering

from qkvjax.errors import UserError
from qkvjax.kernels import limits, tile
from qkvjax.kernels.hopper import backward as hopper_backward
from qkvjax.kernels.hopper import block as hopper_block
from qkvjax.kernels.hopper.block import Blocks, Warpgroup, barriers, slot_of
from qkvjax.kernels.triton import attention as triton

WIDTHS = (64, 128, 256)
DTYPES = ("bfloat16", "float16")


# By (head width, whether the keys are the values): the fastest on an H200
# (benchmarks/results/h200/tiles.jsonl). What is missing here goes by Triton, which is faster there.
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


def refusal(q, v=None, *, softcap=None, q_pe=None, **_) -> str | None:
    """Why this kernel does not take such arguments; None where it does."""
    if v is not None and v.shape[-1] != q.shape[-1]:
        return "its values are as wide as its keys"
    return limits.refusal(q, v, WIDTHS, DTYPES, second_part_of_the_scores=q_pe, softcap=softcap)


def attention(
    q,
    k,
    v=None,
    *,
    causal=True,
    segment_ids=None,
    window=None,
    scale=None,
    q_pe=None,
    k_pe=None,
    forward: Blocks | None = None,
    backward: Blocks | None = None,
    interpret: object = None,
) -> jax.Array:
    """As `kernels.dispatch.attention`, whose arguments these are.

    Args:
      forward, backward: tile sizes; None takes this file's.
      interpret: `InterpretGPUParams`, to run on any machine from jax 0.11 on, slowly.

    Raises:
      UserError: `refusal` has an answer.
    """
    why = refusal(q, v, q_pe=q_pe)
    if why:
        raise UserError(f"the hopper kernel takes no such attention: {why}")
    length, width = q.shape[1], q.shape[-1]
    which = width, v is None
    sizes = (
        forward or FORWARD[which],
        *(
            backward or ours.get(which, triton_s[which])
            for ours, triton_s in ((KEYS, triton.KEYS), (QUERIES, triton.QUERIES))
        ),
    )
    scale = width**-0.5 if scale is None else float(scale)
    options = triton.Options(causal, window, scale, length, sizes[0], sizes[1:], interpret)
    # A block holds two tiles of queries, or of keys.
    step = 2 * max(max(blocks.queries, blocks.keys) for blocks in sizes)
    arrays = tile.padded((q, k, v, segment_ids), length, step)
    return _attend(options, *arrays)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, segments):
    return _forward(options, q, k, v, segments)[0]


def _forward(options, q, k, v, segments):
    out, normaliser = forward_pass(options, q, k, v, segments)
    return out, (q, k, v, segments, out, normaliser)


def _backward(options, residuals, slope):
    q, k, v, segments, out, normaliser = residuals
    rest = v, segments, slope, normaliser, tile.delta(out, slope, options.scale)
    of_keys, of_queries = options.backward
    if isinstance(of_keys, Blocks):
        dk, dv = hopper_backward.keys_pass(options, q, k, *rest)
    else:
        [dk], dv = triton.keys_pass(options, (q,), (k,), *rest)
    if isinstance(of_queries, Blocks):
        dq = hopper_backward.queries_pass(options, q, k, *rest)
    else:
        [dq] = triton.queries_pass(options, (q,), (k,), *rest)
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def forward_pass(options: tile.Options, q, k, v, segments) -> tuple[jax.Array, jax.Array]:
    """(attention [B, T, N, H], its normalisers [B, N, T] in base 2) of padded sequences.

    `options.forward` are `Blocks`; T is a multiple of two tiles of queries and of a tile of keys.
    """
    batch, length, heads, width = q.shape
    blocks, interpret = options.forward, options.interpret
    rows = 2 * blocks.queries
    spans = tile.spans(rows, blocks.keys, length, segments=segments, **options.limits)
    held = functools.partial(hopper_block.tiles, width=width, dtype=q.dtype)
    scratch = {
        "own": held(2, blocks.queries),
        "numbers": lowering.SMEM((2, blocks.queries), jnp.float32),
        "keys": held(blocks.slots, blocks.keys),
        "values": None if v is None else held(blocks.slots, blocks.keys),
        "arrived": barriers(2),
        "full": [barriers(blocks.slots) for _ in range(1 if v is None else 2)],
        "free": [barriers(blocks.slots, arrivals=2) for _ in range(1 if v is None else 2)],
        "turn": barriers(1, arrivals=2),
    }
    out = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in ((q.shape, q.dtype), ((batch, heads, length), jnp.float32))
    ]
    edges = options.edges(length, segments)
    return hopper_block.launch(
        functools.partial(_kernel, options, edges, heads // k.shape[2]),
        "attention_hopper_forward",
        (spans, q, k, v, segments),
        out,
        scratch,
        {"head": heads, "sequence": batch, "tile": length // rows},
        interpret,
    )


def _kernel(
    options, edges, group, inputs, outputs, *, own, numbers, keys, values, arrived, full, free, turn
):
    spans, q, k, v, segments = inputs
    out, normaliser = outputs
    blocks = options.forward
    head, sequence, me = (jax.lax.axis_index(n) for n in ("head", "sequence", "warpgroup"))
    i = hopper_block.last_first("tile")
    span = hopper_block.span_of(spans, sequence, i)
    begin, end = span[0], span[3]
    warps = Warpgroup(options.interpret)

    def take_turns():
        lowering.barrier_arrive(turn)
        lowering.barrier_wait(turn)

    @pl.when(me < 2)
    def _compute():
        lowering.set_max_registers(hopper_block.COMPUTE, action="increase")
        first = (2 * i + me) * blocks.queries
        here = sequence, pl.ds(first, blocks.queries), head
        mine = own.at[me]
        lowering.copy_gmem_to_smem(q.at[here], mine, arrived.at[me])
        lowering.barrier_wait(arrived.at[me])

        def step(j, state, masked):
            top, total, mixed = state
            slot = slot_of(j - begin, blocks.slots)
            lowering.barrier_wait(full[0].at[slot])
            [products] = warps.products((mine, keys.at[slot]), then=take_turns)
            if v is not None:
                warps.release(free[0].at[slot])
            seen = None
            if masked:
                at = first, j * blocks.keys
                seen = warps.seen(options, at, products.shape, segments, sequence)
            top, shrink, weights = tile.weigh(top, products, seen, options.scale)
            mixed, narrow = mixed * tile.down(shrink, mixed), weights.astype(q.dtype)
            total = total * shrink + jnp.sum(weights, axis=1)
            top, total, mixed, narrow = warps.settled(top, total, mixed, narrow)
            lowering.barrier_arrive(turn)  # done with the softmax
            if v is not None:
                lowering.barrier_wait(full[1].at[slot])
            lowering.barrier_wait(turn)
            value = (keys if v is None else values).at[slot]
            [mixed] = warps.add((mixed, (narrow, value)))
            warps.release(free[-1].at[slot])
            return top, total, mixed

        pl.when(me == 1)(take_turns)
        top = warps.zeros(blocks.queries)
        start = top + tile.HIDDEN, top, warps.zeros(blocks.queries, q.shape[-1])
        top, total, mixed = tile.walk(span, step, start, edges)
        pl.when(me == 0)(take_turns)
        total = jnp.maximum(total, 1e-30)  # of rows that pad the sequence
        there = sequence, head, pl.ds(first, blocks.queries)
        hopper_block.write(
            (mine, mixed / tile.down(total, mixed), out.at[here]),
            (numbers.at[me], top + jnp.log(total) * tile.LOG2E, normaliser.at[there]),
        )

    @pl.when(me == 2)
    def _feed():
        lowering.set_max_registers(hopper_block.FEED, action="decrease")
        kv_head = jax.lax.div(head, jnp.array(group, head.dtype))

        def copy(step, slot):
            at = sequence, pl.ds((begin + step) * blocks.keys, blocks.keys), kv_head
            lowering.copy_gmem_to_smem(k.at[at], keys.at[slot], full[0].at[slot])
            if v is not None:
                lowering.copy_gmem_to_smem(v.at[at], values.at[slot], full[1].at[slot])

        hopper_block.feed(end - begin, blocks.slots, free, copy)
