"""What a block of a Hopper kernel is made of: warpgroups, tiles in shared memory, barriers.

A block has three warpgroups. Two compute; the third feeds them through rings of slots in shared
memory: `feed` fills a slot, the others wait until it is full, and `release` it.
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
    """Tile sizes, multiples of 64 (of what a block holds, those of a warpgroup), and slots."""

    queries: int
    keys: int
    slots: int


COMPUTE, FEED = 232, 40  # registers of a thread: all that two and one warpgroups can have
OLD = jax.__version_info__ < (0, 11)  # two names were others
LAYOUT = lowering.Layout.WGMMA  # how a tile lies in the registers of a warpgroup


def launch(kernel, name: str, inputs, outputs, scratch, grid: dict, interpret) -> list[jax.Array]:
    """kernel(inputs, outputs, **scratch), trees of references, on every point of a grid."""
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
    """Tiles [rows, width] in shared memory, as the tensor cores want them."""
    layout = lowering.TilingTransform((8, 64)), lowering.SwizzleTransform(128)
    return lowering.SMEM((count, rows, width), dtype, transforms=layout)


def barriers(count: int, arrivals: int = 1):
    return lowering.Barrier(num_arrivals=arrivals, num_barriers=count)


def span_of(spans, sequence, i) -> list:
    """A tile's row of `tile.spans`."""
    return [spans[jnp.minimum(sequence, spans.shape[0] - 1), i, edge] for edge in range(4)]


def last_first(axis: str):
    """This block's number along an axis whose last tiles are the first to be computed: of a causal
    sequence they have the most to do."""
    return jax.lax.axis_size(axis) - 1 - jax.lax.axis_index(axis)


def write(*results) -> None:
    """Of each (reference to shared memory, its new content, where it goes)."""
    for ref, found, _ in results:
        ref[...] = found.astype(ref.dtype)
    lowering.commit_smem()
    for ref, _, place in results:
        lowering.copy_smem_to_gmem(ref, place)
    lowering.wait_smem_to_gmem(0)


def turned(ref):
    """The transpose of a tile in shared memory."""
    if OLD:
        return lowering.transpose_ref(ref, (1, 0))
    return ref.transpose((1, 0))


def slot_of(step, slots: int):
    return jax.lax.rem(step, jnp.array(slots, step.dtype))


def feed(steps, slots: int, free: list, copy) -> None:
    """copy(step, slot) for every step, as soon as its slot is free."""

    def fill(step, _):
        slot = slot_of(step, slots)

        @pl.when(step >= slots)
        def _wait():
            for barrier in free:
                lowering.barrier_wait(barrier.at[slot])

        copy(step, slot)

    def drain(step, _):  # what is left, so that no barrier is left behind
        for barrier in free:
            lowering.barrier_wait(barrier.at[slot_of(step, slots)])

    jax.lax.fori_loop(0, steps, fill, None)
    jax.lax.fori_loop(jnp.maximum(steps - slots, 0), steps, drain, None)


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """What a computing warpgroup does with tiles. `interpret`ed, its products are plain ones: the
    interpreter knows neither the tensor cores nor how tiles lie in registers."""

    interpret: object = None

    def zeros(self, *shape: int) -> jax.Array:
        """float32 [r, c], or [r] of a tile's rows."""
        zeros = jnp.zeros(shape, jnp.float32)
        if self.interpret:
            return zeros
        return lowering.layout_cast(zeros, LAYOUT if len(shape) == 2 else LAYOUT.reduce(1))

    def products(self, *pairs, then=lambda: None) -> list[jax.Array]:
        """a b^T, float32 [r, c], of each pair of tiles in shared memory; then() as they run."""
        if self.interpret:
            found = [tile.dot(a[...], b[...], (1, 1)) for a, b in pairs]
            then()
            return found

        def run(*sums):
            for ref, (a, b) in zip(sums, pairs):
                lowering.wgmma(ref, a, turned(b))
            then()
            return [ref[...] for ref in sums]

        shapes = [(a.shape[0], b.shape[0]) for a, b in pairs]
        return pl.run_scoped(run, *(lowering.ACC(shape, jnp.float32) for shape in shapes))

    def add(self, *totals) -> list[jax.Array]:
        """Of each (sum, (a, b), ...): the sum and each a b, of tiles in registers and in shared
        memory."""
        if self.interpret:
            return [s + sum(tile.dot(a, b[...]) for a, b in pairs) for s, *pairs in totals]

        def run(refs):
            for ref, (_, *pairs) in zip(refs, totals):
                for a, b in pairs:
                    lowering.wgmma(ref, a, b)

        return pl.run_state(run)([lowering.ACC.init(total) for total, *_ in totals])

    def settled(self, *values):
        """Keeps the compiler from computing these later."""
        return values if self.interpret else jax.lax.optimization_barrier(values)

    def release(self, barrier) -> None:
        """Says that this warpgroup is done with a slot."""
        if self.interpret:
            lowering.commit_smem()  # the interpreter's reads are not the tensor cores'
        lowering.barrier_arrive(barrier)

    def numbers(self, ref, along: bool = False) -> jax.Array:
        """A reference's numbers, as they lie down the rows of a tile, or along its columns."""
        if self.interpret:
            return ref[...]
        layout = LAYOUT.reduce(0 if along else 1)
        index = [()] if OLD else []
        return lowering.load(ref, *index, layout=layout, optimized=False)

    def seen(self, options: tile.Options, first, shape, segments, sequence, turned: bool = False):
        """The mask of a sequence's tile whose queries and keys begin at places `first`, [queries,
        keys] or `turned`; segments is None or a reference to those of all sequences."""
        axes = (1, 0) if turned else (0, 1)

        def iota(axis):
            if self.interpret:
                return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            return lowering.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT)

        rows, columns = (iota(axis) + at for axis, at in zip(axes, first))
        if segments is None:
            return tile.visible(rows, columns, **options.limits)
        of = []
        for axis, at in zip(axes, first):
            places = segments.at[sequence, pl.ds(at, shape[axis])]
            found = self.numbers(places, along=axis == 1)
            of.append(jax.lax.broadcast_in_dim(found, shape, (axis,)))
        return tile.visible(
            rows, columns, **options.limits, row_segments=of[0], column_segments=of[1]
        )
