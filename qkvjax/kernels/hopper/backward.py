"""Attention in Pallas for NVIDIA's Hopper GPUs, through Mosaic: the gradients.

Two kernels, in blocks like those of `kernels.hopper`. One holds tiles of keys (and values) while
the queries of their group of heads pass by, the other tiles of queries. With K = V the first has
one accumulator and one write, dKV = dS^T Q + P^T dO.

Letters: B sequences, T places, N query heads, K key-value heads, H head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as lowering

from qkvjax.kernels import tile
from qkvjax.kernels.hopper import block as hopper_block
from qkvjax.kernels.hopper.block import Warpgroup, barriers, slot_of


def keys_pass(options: tile.Options, q, k, v, segments, slope, normaliser, delta):
    """Gradients (of keys, of values or None) [B, T, K, H] of padded sequences.

    `options.backward[0]` are `Blocks`; normaliser and delta are [B, N, T].
    """
    batch, length, heads, width = q.shape
    kv_heads, blocks = k.shape[2], options.backward[0]
    places = 2 * blocks.keys
    spans = tile.spans(
        blocks.queries, places, length, segments=segments, turned=True, **options.limits
    )
    held = functools.partial(hopper_block.tiles, width=width, dtype=q.dtype)
    count = 1 if v is None else 2
    scratch = {
        "own": [held(2, blocks.keys) for _ in range(count)],
        "tiles": [held(blocks.slots, blocks.queries) for _ in range(2)],
        "numbers": [lowering.SMEM((blocks.slots, blocks.queries), jnp.float32) for _ in range(2)],
        "arrived": barriers(2, arrivals=count),
        "full": barriers(blocks.slots, arrivals=4),
        "free": barriers(blocks.slots, arrivals=2),
    }
    found = hopper_block.launch(
        functools.partial(
            _keys_kernel, options, options.edges(length, segments, turned=True), heads // kv_heads
        ),
        "attention_hopper_keys",
        (spans, q, k, v, segments, slope, normaliser, delta),
        [jax.ShapeDtypeStruct(k.shape, k.dtype)] * count,
        scratch,
        {"head": kv_heads, "sequence": batch, "tile": length // places},
        options.interpret,
    )
    return found if count == 2 else (*found, None)


def _keys_kernel(
    options, edges, group, inputs, outputs, *, own, tiles, numbers, arrived, full, free
):
    spans, q, k, v, segments, slope, normaliser, delta = inputs
    blocks, _ = options.backward
    head, sequence, i, me = (
        jax.lax.axis_index(n) for n in ("head", "sequence", "tile", "warpgroup")
    )
    span = hopper_block.span_of(spans, sequence, i)
    begin, count = span[0], span[3] - span[0]
    warps = Warpgroup(options.interpret)

    @pl.when(me < 2)
    def _compute():
        lowering.set_max_registers(hopper_block.COMPUTE, action="increase")
        first = (2 * i + me) * blocks.keys
        here = sequence, pl.ds(first, blocks.keys), head
        mine = [ref.at[me] for ref in own]
        for source, ref in zip((k, v), mine):
            lowering.copy_gmem_to_smem(source.at[here], ref, arrived.at[me])
        lowering.barrier_wait(arrived.at[me])

        def of_head(n, sums):
            def step(j, sums, masked):
                slot = slot_of(n * count + j - begin, blocks.slots)
                lowering.barrier_wait(full.at[slot])
                queries, slopes = (ref.at[slot] for ref in tiles)
                pairs = (mine[0], queries), (mine[-1], slopes)
                products, value_products = warps.products(*pairs)
                seen = None
                if masked:
                    at = j * blocks.queries, first
                    seen = warps.seen(options, at, products.shape, segments, sequence, turned=True)
                of_column = [warps.numbers(ref.at[slot], along=True) for ref in numbers]
                of_column = [jax.lax.broadcast_in_dim(x, products.shape, (1,)) for x in of_column]
                weights, slope = tile.weights_and_slopes(
                    products, seen, of_column[0], value_products, of_column[1], options.scale
                )
                from_keys = slope.astype(q.dtype), queries
                from_values = weights.astype(q.dtype), slopes
                if v is None:  # one accumulator: dKV = dS^T Q + P^T dO
                    sums = warps.add((sums[0], from_values, from_keys))
                else:
                    sums = warps.add((sums[0], from_keys), (sums[1], from_values))
                warps.release(free.at[slot])
                return sums

            return tile.walk(span, step, sums, edges)

        start = [warps.zeros(blocks.keys, q.shape[-1]) for _ in mine]
        sums = jax.lax.fori_loop(0, group, of_head, start)
        places = (array.at[here] for array in outputs)
        hopper_block.write(*zip(mine, sums, places))

    @pl.when(me == 2)
    def _feed():
        lowering.set_max_registers(hopper_block.FEED, action="decrease")

        def copy(step, slot):
            n = head * group + jax.lax.div(step, count)
            at = pl.ds((begin + jax.lax.rem(step, count)) * blocks.queries, blocks.queries)
            for source, ref in zip((q, slope), tiles):
                source = source.at[sequence, at, n]
                lowering.copy_gmem_to_smem(source, ref.at[slot], full.at[slot])
            for source, ref in zip((normaliser, delta), numbers):
                source = source.at[sequence, n, at]
                lowering.copy_gmem_to_smem(source, ref.at[slot], full.at[slot])

        hopper_block.feed(group * count, blocks.slots, [free], copy)


def queries_pass(options: tile.Options, q, k, v, segments, slope, normaliser, delta):
    """Gradient of the queries [B, T, N, H]; arguments are as `keys_pass`'s."""
    batch, length, heads, width = q.shape
    blocks = options.backward[1]
    places = 2 * blocks.queries
    spans = tile.spans(places, blocks.keys, length, segments=segments, **options.limits)
    held = functools.partial(hopper_block.tiles, width=width, dtype=q.dtype)
    count = 1 if v is None else 2
    scratch = {
        "own": [held(2, blocks.queries) for _ in range(2)],
        "tiles": [held(blocks.slots, blocks.keys) for _ in range(count)],
        "arrived": barriers(2, arrivals=2),
        "full": barriers(blocks.slots, arrivals=count),
        "free": barriers(blocks.slots, arrivals=2),
    }
    [found] = hopper_block.launch(
        functools.partial(
            _queries_kernel, options, options.edges(length, segments), heads // k.shape[2]
        ),
        "attention_hopper_queries",
        (spans, q, k, v, segments, slope, normaliser, delta),
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        scratch,
        {"head": heads, "sequence": batch, "tile": length // places},
        options.interpret,
    )
    return found


def _queries_kernel(options, edges, group, inputs, outputs, *, own, tiles, arrived, full, free):
    spans, q, k, v, segments, slope, normaliser, delta = inputs
    _, blocks = options.backward
    head, sequence, me = (jax.lax.axis_index(n) for n in ("head", "sequence", "warpgroup"))
    i = hopper_block.last_first("tile")
    span = hopper_block.span_of(spans, sequence, i)
    begin = span[0]
    warps = Warpgroup(options.interpret)

    @pl.when(me < 2)
    def _compute():
        lowering.set_max_registers(hopper_block.COMPUTE, action="increase")
        first = (2 * i + me) * blocks.queries
        here = sequence, pl.ds(first, blocks.queries), head
        mine = [ref.at[me] for ref in own]
        for source, ref in zip((q, slope), mine):
            lowering.copy_gmem_to_smem(source.at[here], ref, arrived.at[me])
        rows = sequence, head, pl.ds(first, blocks.queries)
        of_row = [warps.numbers(x.at[rows]) for x in (normaliser, delta)]
        lowering.barrier_wait(arrived.at[me])

        def step(j, sums, masked):
            slot = slot_of(j - begin, blocks.slots)
            lowering.barrier_wait(full.at[slot])
            keys, value = tiles[0].at[slot], tiles[-1].at[slot]
            products, value_products = warps.products((mine[0], keys), (mine[1], value))
            seen = None
            if masked:
                at = first, j * blocks.keys
                seen = warps.seen(options, at, products.shape, segments, sequence)
            numbers = [tile.down(x, products) for x in of_row]
            _, slope = tile.weights_and_slopes(
                products, seen, numbers[0], value_products, numbers[1], options.scale
            )
            sums = warps.add((*sums, (slope.astype(q.dtype), keys)))
            warps.release(free.at[slot])
            return sums

        sums = tile.walk(span, step, [warps.zeros(blocks.queries, q.shape[-1])], edges)
        places = (array.at[here] for array in outputs)
        hopper_block.write(*zip(mine, sums, places))

    @pl.when(me == 2)
    def _feed():
        lowering.set_max_registers(hopper_block.FEED, action="decrease")
        kv_head = jax.lax.div(head, jnp.array(group, head.dtype))

        def copy(step, slot):
            at = sequence, pl.ds((begin + step) * blocks.keys, blocks.keys), kv_head
            for source, ref in zip((k, v), tiles):
                lowering.copy_gmem_to_smem(source.at[at], ref.at[slot], full.at[slot])

        hopper_block.feed(span[3] - begin, blocks.slots, [free], copy)
