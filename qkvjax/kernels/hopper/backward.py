"""Attention in Pallas for NVIDIA's Hopper GPUs, through Mosaic: the gradients.

Two kernels, in blocks like that of the forward pass: warpgroups 0 and 1 hold a tile each, and
warpgroup 2 feeds them through one ring of slots (`block`). Each computes the weights P and the
gradient dS of its tiles' scores anew, from the forward pass's `lse`.

    attention_hopper_keys                             attention_hopper_queries
      two warpgroups, a tile of keys each               two warpgroups, a tile of queries each
      shared memory: K tile (and V tile)                shared memory: Q tile, dO tile
      registers: dK (and dV) [keys, H]                  registers: dQ [queries, H], lse, delta [r]
      a slot: Q_i, dO_i, lse_i, delta_i                 a slot: K_j (and V_j)
      walks over the heads of its group, and            walks over the tiles of keys that its
      over the tiles of queries that see its keys       queries see

    one step, with the tile [keys, queries]           one step, with the tile [queries, keys]
      wait full[slot]                                   wait full[slot]
      S^T = K Q_i^T,  dP^T = V dO_i^T                   S = Q K_j^T,  dP = dO V_j^T
      P^T, dS^T                                         dS
      dK += dS^T Q_i,  dV += P^T dO_i                   dQ += dS K_j
      release free[slot]                                release free[slot]

Tiles of the first kernel are transposed because the left side of a product is in registers: so P^T
and dS^T are where they are needed. With K = V it has one accumulator and one write,
dKV = dS^T Q + P^T dO. The warpgroups do not wait for each other, except for slots.

Letters: B sequences, T positions, N query heads, K key-value heads, H head width.
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

# ---- keys and values --------------------------------------------------------------------------


def keys_pass(options: tile.Options, q, k, v, segments, d_out, lse, delta):
    """Returns the gradients (of keys, of values or None), [B, T, K, H], of padded sequences.

    Args:
      options: `options.backward[0]` is a `block.Blocks`.
      d_out: [B, T, N, H].
      lse, delta: float32 [B, N, T], of the forward pass and of `tile.delta`.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    blocks = options.backward[0]
    columns = 2 * blocks.keys  # of a block
    ranges = tile.ranges(
        blocks.queries, columns, length, segments=segments, by_keys=True, **options.mask_rules
    )
    smem = functools.partial(hopper_block.tiles, width=width, dtype=q.dtype)
    row_numbers = lowering.SMEM((blocks.slots, blocks.queries), jnp.float32)
    count = 1 if v is None else 2
    scratch = {
        "resident_tiles": [smem(2, blocks.keys) for _ in range(count)],
        "tile_rings": [smem(blocks.slots, blocks.queries) for _ in range(2)],
        "number_rings": [row_numbers for _ in range(2)],
        "arrived": barriers(2, arrivals=count),
        # The copies of Q, dO, lse and delta all arrive at one barrier.
        "full": barriers(blocks.slots, arrivals=4),
        "free": barriers(blocks.slots, arrivals=2),
    }
    masked_ends = options.masked_ends(length, segments, by_keys=True)
    gradients = hopper_block.launch(
        functools.partial(_keys_kernel, options, masked_ends, group),
        "attention_hopper_keys",
        (ranges, q, k, v, segments, d_out, lse, delta),
        [jax.ShapeDtypeStruct(k.shape, k.dtype)] * count,
        scratch,
        {"head": kv_heads, "sequence": batch, "tile": length // columns},
        options.interpret,
    )
    return gradients if count == 2 else (*gradients, None)


def _keys_kernel(
    options,
    masked_ends,
    group,
    inputs,
    outputs,
    *,
    resident_tiles,
    tile_rings,
    number_rings,
    arrived,
    full,
    free,
):
    """Computes the gradients of two tiles of keys (and values) of one key-value head."""
    ranges, q, k, v, segments, d_out, lse, delta = inputs
    blocks, _ = options.backward
    head, sequence, i, warpgroup = (
        jax.lax.axis_index(name) for name in ("head", "sequence", "tile", "warpgroup")
    )
    tile_range = hopper_block.range_of(ranges, sequence, i)
    begin = tile_range[0]
    count = tile_range[3] - tile_range[0]  # steps of each query head
    warps = Warpgroup(options.interpret)

    @pl.when(warpgroup < 2)
    def _compute():
        lowering.set_max_registers(hopper_block.COMPUTE_REGISTERS, action="increase")
        first = (2 * i + warpgroup) * blocks.keys
        columns = sequence, pl.ds(first, blocks.keys), head
        own_tiles = [ref.at[warpgroup] for ref in resident_tiles]
        for source, ref in zip((k, v), own_tiles):
            lowering.copy_gmem_to_smem(source.at[columns], ref, arrived.at[warpgroup])
        # Every product reads these tiles.
        lowering.barrier_wait(arrived.at[warpgroup])
        key_tile = own_tiles[0]
        value_tile = own_tiles[-1]

        def add_head(n, sums):
            """Adds what query head n of the group contributes."""

            def step(j, sums, masked):
                # The ring goes on from one head to the next.
                slot = slot_of(n * count + j - begin, blocks.slots)
                # Q, dO, lse and delta of this tile have landed.
                lowering.barrier_wait(full.at[slot])
                queries, d_outs = (ref.at[slot] for ref in tile_rings)
                # Both products are started before either is waited for.
                scores, d_weights = warps.products((key_tile, queries), (value_tile, d_outs))
                mask = None
                if masked:
                    positions = j * blocks.queries, first
                    mask = warps.mask(
                        options, positions, scores.shape, segments, sequence, keys_down=True
                    )
                # The numbers of the queries lie along the columns of the transposed tile.
                tile_lse, tile_delta = [
                    jax.lax.broadcast_in_dim(numbers, scores.shape, (1,))
                    for numbers in [
                        warps.numbers(ref.at[slot], along_columns=True) for ref in number_rings
                    ]
                ]
                weights, d_scores = tile.weights_and_d_scores(
                    scores, mask, tile_lse, d_weights, tile_delta, options.scale
                )
                to_keys = d_scores.astype(q.dtype), queries
                to_values = weights.astype(q.dtype), d_outs
                if v is None:  # one accumulator: dKV = dS^T Q + P^T dO
                    sums = warps.add((sums[0], to_values, to_keys))
                else:
                    sums = warps.add((sums[0], to_keys), (sums[1], to_values))
                # The last products that read the slot are complete.
                warps.release(free.at[slot])
                return sums

            return tile.walk(tile_range, step, sums, masked_ends)

        start = [warps.zeros(blocks.keys, q.shape[-1]) for _ in own_tiles]
        sums = jax.lax.fori_loop(0, group, add_head, start)
        # The gradients go out through the tiles of keys and values, which nothing reads any more.
        hopper_block.write(*zip(own_tiles, sums, (array.at[columns] for array in outputs)))

    @pl.when(warpgroup == 2)
    def _feed():
        lowering.set_max_registers(hopper_block.FEED_REGISTERS, action="decrease")

        def copy(step, slot):
            n = head * group + jax.lax.div(step, count)
            at = pl.ds((begin + jax.lax.rem(step, count)) * blocks.queries, blocks.queries)
            for source, ref in zip((q, d_out), tile_rings):
                source = source.at[sequence, at, n]
                lowering.copy_gmem_to_smem(source, ref.at[slot], full.at[slot])
            for source, ref in zip((lse, delta), number_rings):
                source = source.at[sequence, n, at]
                lowering.copy_gmem_to_smem(source, ref.at[slot], full.at[slot])

        hopper_block.feed(group * count, blocks.slots, [free], copy)


# ---- queries ----------------------------------------------------------------------------------


def queries_pass(options: tile.Options, q, k, v, segments, d_out, lse, delta):
    """Returns the gradient of the queries [B, T, N, H]; arguments are as in `keys_pass`, with the
    tile sizes `options.backward[1]`."""
    batch, length, heads, width = q.shape
    blocks = options.backward[1]
    rows = 2 * blocks.queries  # of a block
    ranges = tile.ranges(rows, blocks.keys, length, segments=segments, **options.mask_rules)
    smem = functools.partial(hopper_block.tiles, width=width, dtype=q.dtype)
    count = 1 if v is None else 2
    scratch = {
        "resident_tiles": [smem(2, blocks.queries) for _ in range(2)],  # of Q and of dO
        "tile_rings": [smem(blocks.slots, blocks.keys) for _ in range(count)],
        "arrived": barriers(2, arrivals=2),
        # The copies of K and V arrive at one barrier: the first two products need both.
        "full": barriers(blocks.slots, arrivals=count),
        "free": barriers(blocks.slots, arrivals=2),
    }
    masked_ends = options.masked_ends(length, segments)
    [gradient] = hopper_block.launch(
        functools.partial(_queries_kernel, options, masked_ends, heads // k.shape[2]),
        "attention_hopper_queries",
        (ranges, q, k, v, segments, d_out, lse, delta),
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        scratch,
        {"head": heads, "sequence": batch, "tile": length // rows},
        options.interpret,
    )
    return gradient


def _queries_kernel(
    options, masked_ends, group, inputs, outputs, *, resident_tiles, tile_rings, arrived, full, free
):
    """Computes the gradient of two tiles of queries of one head."""
    ranges, q, k, v, segments, d_out, lse, delta = inputs
    _, blocks = options.backward
    head, sequence, warpgroup = (
        jax.lax.axis_index(name) for name in ("head", "sequence", "warpgroup")
    )
    i = hopper_block.last_first("tile")
    tile_range = hopper_block.range_of(ranges, sequence, i)
    begin = tile_range[0]
    warps = Warpgroup(options.interpret)

    @pl.when(warpgroup < 2)
    def _compute():
        lowering.set_max_registers(hopper_block.COMPUTE_REGISTERS, action="increase")
        first = (2 * i + warpgroup) * blocks.queries
        rows = sequence, pl.ds(first, blocks.queries), head
        own_tiles = [ref.at[warpgroup] for ref in resident_tiles]
        for source, ref in zip((q, d_out), own_tiles):
            lowering.copy_gmem_to_smem(source.at[rows], ref, arrived.at[warpgroup])
        # While the tiles are copied, the numbers of the rows are loaded into registers.
        numbers_at = sequence, head, pl.ds(first, blocks.queries)
        row_numbers = [warps.numbers(x.at[numbers_at]) for x in (lse, delta)]
        # Every product reads the tiles of Q and dO.
        lowering.barrier_wait(arrived.at[warpgroup])
        q_tile, d_out_tile = own_tiles

        def step(j, sums, masked):
            slot = slot_of(j - begin, blocks.slots)
            # K_j (and V_j) have landed.
            lowering.barrier_wait(full.at[slot])
            keys = tile_rings[0].at[slot]
            values = tile_rings[-1].at[slot]
            # Both products are started before either is waited for.
            scores, d_weights = warps.products((q_tile, keys), (d_out_tile, values))
            mask = None
            if masked:
                positions = first, j * blocks.keys
                mask = warps.mask(options, positions, scores.shape, segments, sequence)
            tile_lse, tile_delta = [tile.along_rows(x, scores) for x in row_numbers]
            _, d_scores = tile.weights_and_d_scores(
                scores, mask, tile_lse, d_weights, tile_delta, options.scale
            )
            sums = warps.add((*sums, (d_scores.astype(q.dtype), keys)))
            # The last product that reads the slot is complete.
            warps.release(free.at[slot])
            return sums

        start = [warps.zeros(blocks.queries, q.shape[-1])]
        sums = tile.walk(tile_range, step, start, masked_ends)
        # The gradient goes out through the tile of queries, which nothing reads any more.
        hopper_block.write(*zip(own_tiles, sums, (array.at[rows] for array in outputs)))

    @pl.when(warpgroup == 2)
    def _feed():
        lowering.set_max_registers(hopper_block.FEED_REGISTERS, action="decrease")
        kv_head = jax.lax.div(head, jnp.array(group, head.dtype))

        def copy(step, slot):
            at = sequence, pl.ds((begin + step) * blocks.keys, blocks.keys), kv_head
            for source, ref in zip((k, v), tile_rings):
                lowering.copy_gmem_to_smem(source.at[at], ref.at[slot], full.at[slot])

        hopper_block.feed(tile_range[3] - begin, blocks.slots, [free], copy)
