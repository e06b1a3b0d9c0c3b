"""A stack whose layers have arrays of their own, as decoding reads them.

`transformer.Stack` keeps each parameter of all repetitions as one array, over which it scans.
Decoding runs layer by layer for each token, and a slice of a stacked array would be copied each
time; so it takes the stack apart once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from qkvjax.models.transformer import REMAT, Block, Stack


class UnrolledStack(nnx.Module):
    """All blocks one by one; computes what the stack that it was made of does.

    Args:
      blocks: the L blocks, without `mlp` where layers share one.
      shared: the feed-forward of each group of layers, or None where each block has its own.
      group: how many layers use one feed-forward.
    """

    def __init__(self, blocks: Sequence[Block], shared: Sequence | None, group: int):
        self.blocks = nnx.List(blocks)
        self.shared = None if shared is None else nnx.List(shared)
        self.group = group

    def __call__(
        self, x, positions, segment_ids=None, key=None, *, impl=None, remat="none", unroll=1
    ):
        """As `transformer.Stack`; `unroll` changes nothing."""
        blocks = self.layers()
        keys = [None] * len(blocks) if key is None else jax.random.split(key, len(blocks))

        @REMAT[remat]
        def run(block, x, key):
            return block(x, positions, segment_ids, key, impl=impl)

        routers = []
        for block, key in zip(blocks, keys, strict=True):
            x, router = run(block, x, key)
            routers.append(router)
        return x, jax.tree.map(lambda *values: sum(values) / len(values), *routers)

    def layers(self) -> list[Block]:
        """The blocks in order, each with the feed-forward that it uses."""
        if self.shared is None:
            return list(self.blocks)
        blocks = []
        for i, block in enumerate(self.blocks):
            block = jax.tree.map(lambda leaf: leaf, block)  # another module of the same arrays
            block.mlp = nnx.data(self.shared[i // self.group])
            blocks.append(block)
        return blocks


def unrolled(stack: Stack, take: Callable[[tuple, jax.Array, int], list[jax.Array]]):
    """Takes a stack apart.

    Args:
      stack: as it was trained.
      take: (path, array [n, ...], n) -> the n arrays [...], for each stacked array of a block.
    """

    def apart(module, count):
        leaves, tree = jax.tree_util.tree_flatten_with_path(module)
        each = [take(path, leaf, count) for path, leaf in leaves]
        return [jax.tree.unflatten(tree, list(parts)) for parts in zip(*each, strict=True)]

    repeats = stack.num_layers // len(stack.blocks)
    blocks = _interleaved([apart(block, repeats) for block in stack.blocks])
    shared = None
    if stack.shared is not None:
        shared = _interleaved([apart(mlp, repeats) for mlp in stack.shared])
    return UnrolledStack(blocks, shared, stack.group)


def _interleaved(columns: list[list]) -> list:
    """Of each repetition all parts, one repetition after another."""
    return [part for repetition in zip(*columns, strict=True) for part in repetition]
