"""What a block of a Hopper kernel is made of: warpgroups, tiles in shared memory, barriers.

A block has three warpgroups of 128 threads. Two compute; the third one feeds them through rings of
slots in shared memory:

    warpgroup 2        shared memory                         warpgroups 0 and 1
    `feed`             ring of `slots` tiles
      wait free[s] <-- free[s]: both warpgroups arrived  <-- `release` free[s]
      copy (TMA)   --> slot s  | tile |
                       full[s]: the copy has landed      --> wait full[s]
                                                             products from slot s (tensor cores)

The copies are asynchronous: warpgroup 2 starts the copy into the next free slot while the others
compute, so that up to `slots` tiles are on their way or in use.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as lowering

from qkvjax.kernels import tile


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes, multiples of 64, and slots of a ring.

    Of what a block holds (queries, or keys in the kernel of the keys' gradients) the size is that
    of one warpgroup's tile, and the block has two.
    """

    queries: int
    keys: int
    slots: int


# Registers of a thread. A processor has 65,536 of them, which is 512 for one thread of each of the
# three warpgroups together. Feeding needs few, and the computing ones get the rest: 2 * 232 + 40.
COMPUTE_REGISTERS = 232
FEED_REGISTERS = 40
IS_OLD = jax.__version_info__ < (0, 11)  # Mosaic's interface differs in two places
LAYOUT = lowering.Layout.WGMMA  # how a tile is distributed over the registers of a warpgroup


# ---- a kernel and its memory ------------------------------------------------------------------


def launch(kernel, name: str, inputs, outputs, scratch, grid: dict, interpret) -> list[jax.Array]:
    """Runs kernel(inputs, outputs, **scratch), of trees of references, on every point of a grid.

    Args:
      inputs: a tree of arrays.
      outputs: a list of shapes.
      scratch: name -> shared memory or barriers.
      grid: name of an axis -> its size.
    """
    flat, tree = jax.tree.flatten(inputs)

    def body(*refs, **scratch):
        kernel(jax.tree.unflatten(tree, refs[: len(flat)]), refs[len(flat) :], **scratch)

    body.__name__ = name
    return lowering.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=lowering.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*flat)


def tiles(count: int, rows: int, width: int, dtype):
    """Returns tiles [rows, width] in shared memory, in the layout that the tensor cores read."""
    layout = lowering.TilingTransform((8, 64)), lowering.SwizzleTransform(128)
    return lowering.SMEM((count, rows, width), dtype, transforms=layout)


def barriers(count: int, arrivals: int = 1):
    """Returns barriers, each of which opens after so many arrivals of warpgroups or copies."""
    return lowering.Barrier(num_arrivals=arrivals, num_barriers=count)


# ---- where a block is -------------------------------------------------------------------------


def range_of(ranges, sequence, i) -> list:
    """Returns a tile's row of `tile.ranges`, four scalars."""
    return [ranges[jnp.minimum(sequence, ranges.shape[0] - 1), i, end] for end in range(4)]


def last_first(axis: str):
    """Returns this block's number along an axis whose last tiles are the first to be computed.

    Of a causal sequence they have the most to do, and a long block that starts last would keep the
    others waiting at the end.
    """
    return jax.lax.axis_size(axis) - 1 - jax.lax.axis_index(axis)


def slot_of(step, slots: int):
    """Returns the slot of a ring that a step uses."""
    return jax.lax.rem(step, jnp.array(slots, step.dtype))


# ---- copies -----------------------------------------------------------------------------------


def feed(steps, slots: int, free: list, copy) -> None:
    """Calls copy(step, slot) for every step, as soon as its slot is free; for warpgroup 2.

    Args:
      free: barriers of each ring; a slot is free when it is free in all of them.
    """

    def wait_until_free(slot):
        for barrier in free:
            lowering.barrier_wait(barrier.at[slot])

    def fill(step, _):
        slot = slot_of(step, slots)

        # The first round finds the slots empty. Later a slot still has the tile of `slots` steps
        # before, which both computing warpgroups must have released.
        @pl.when(step >= slots)
        def _wait():
            wait_until_free(slot)

        copy(step, slot)

    def drain(step, _):
        wait_until_free(slot_of(step, slots))

    jax.lax.fori_loop(0, steps, fill, None)
    # The releases of the last tiles are awaited too: every arrival at a barrier has its wait, and
    # the block ends with its barriers as it found them.
    jax.lax.fori_loop(jnp.maximum(steps - slots, 0), steps, drain, None)


def write(*results) -> None:
    """Writes results to global memory, by way of shared memory.

    Args:
      results: (reference to shared memory, its new content, reference to where it goes) each.
    """
    for smem, value, _ in results:
        smem[...] = value.astype(smem.dtype)
    # The copies below read shared memory through another path than the stores above wrote it:
    # without the commit they could read what was there before.
    lowering.commit_smem()
    for smem, _, gmem in results:
        lowering.copy_smem_to_gmem(smem, gmem)
    # Shared memory must live until the copies have read it.
    lowering.wait_smem_to_gmem(0)


# ---- computing --------------------------------------------------------------------------------


def transposed(ref):
    """Returns the transpose of a tile in shared memory; nothing is moved."""
    if IS_OLD:
        return lowering.transpose_ref(ref, (1, 0))
    return ref.transpose((1, 0))


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """What a computing warpgroup does with tiles.

    When it is interpreted, its products are plain ones: the interpreter knows neither the tensor
    cores nor the distribution of a tile over registers.
    """

    interpret: object = None

    def zeros(self, *shape: int) -> jax.Array:
        """Returns float32 zeros, [r, c] or [r] of a tile's rows."""
        zeros = jnp.zeros(shape, jnp.float32)
        if self.interpret:
            return zeros
        return lowering.layout_cast(zeros, LAYOUT if len(shape) == 2 else LAYOUT.reduce(1))

    def products(self, *pairs, then=lambda: None) -> list[jax.Array]:
        """Returns a b^T, float32 [r, c], of each pair of tiles in shared memory.

        Args:
          then: is called when the products were started, before they are waited for.
        """
        if self.interpret:
            results = [tile.dot(a[...], b[...], (1, 1)) for a, b in pairs]
            then()
            return results

        def run(*accumulators):
            for acc, (a, b) in zip(accumulators, pairs):
                lowering.wgmma(acc, a, transposed(b))
            then()
            # Reading an accumulator waits for its products.
            return [acc[...] for acc in accumulators]

        shapes = [(a.shape[0], b.shape[0]) for a, b in pairs]
        return pl.run_scoped(run, *(lowering.ACC(shape, jnp.float32) for shape in shapes))

    def add(self, *totals) -> list[jax.Array]:
        """Returns, of each (sum, (a, b), ...), the sum and the products a b.

        The tile a is in registers, b in shared memory. On return the products are complete, so
        that the slots of b may be released.
        """
        if self.interpret:
            return [s + sum(tile.dot(a, b[...]) for a, b in pairs) for s, *pairs in totals]

        def run(refs):
            for ref, (_, *pairs) in zip(refs, totals):
                for a, b in pairs:
                    lowering.wgmma(ref, a, b)

        return pl.run_state(run)([lowering.ACC.init(total) for total, *_ in totals])

    def computed_here(self, *values):
        """Returns the values, and keeps the compiler from computing them later than here."""
        return values if self.interpret else jax.lax.optimization_barrier(values)

    def release(self, barrier) -> None:
        """Arrives at a slot's barrier: this warpgroup no longer reads the slot."""
        if self.interpret:
            # The tensor cores' reads are complete. The interpreter's plain reads need this.
            lowering.commit_smem()
        lowering.barrier_arrive(barrier)

    def numbers(self, ref, along_columns: bool = False) -> jax.Array:
        """Loads numbers in the layout of a tile's rows, or of its columns."""
        if self.interpret:
            return ref[...]
        layout = LAYOUT.reduce(0 if along_columns else 1)
        index = [()] if IS_OLD else []
        return lowering.load(ref, *index, layout=layout, optimized=False)

    def mask(
        self, options: tile.Options, first, shape, segments, sequence, keys_down: bool = False
    ):
        """Returns the mask of a tile, [queries, keys], or [keys, queries] with `keys_down`.

        Args:
          first: positions of the tile's first query and first key.
          shape: of the tile.
          segments: reference to those of all sequences, or None.
        """
        axes = (1, 0) if keys_down else (0, 1)  # of the queries and of the keys

        def iota(axis):
            if self.interpret:
                return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            return lowering.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT)

        rows, columns = (iota(axis) + start for axis, start in zip(axes, first))
        if segments is None:
            return tile.visible(rows, columns, **options.mask_rules)
        # Straight from global memory: only masked tiles need them.
        of_queries, of_keys = (
            jax.lax.broadcast_in_dim(
                self.numbers(
                    segments.at[sequence, pl.ds(start, shape[axis])], along_columns=axis == 1
                ),
                shape,
                (axis,),
            )
            for axis, start in zip(axes, first)
        )
        return tile.visible(
            rows,
            columns,
            **options.mask_rules,
            row_segments=of_queries,
            column_segments=of_keys,
        )
