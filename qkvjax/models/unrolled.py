"""A stack whose layers have arrays of their own, which is what decoding reads.

A deep `transformer.Stack` keeps each parameter of the layers that are alike as one array, and scans
over it. Decoding runs layer by layer for each token, and a slice of a stacked array would be copied
each time. So the stack is taken apart once, before decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from qkvjax.models.transformer import REMAT, Block, Stack


class UnrolledStack(nnx.Module):
    """All blocks one by one; computes what the `Stack` that it was made of computes.

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
        """Runs the layers as `transformer.Stack` does; `unroll` changes nothing."""
        blocks = self.layers()
        keys = [None] * len(blocks) if key is None else jax.random.split(key, len(blocks))

        @REMAT[remat]
        def run_block(block, x, key):
            return block(x, positions, segment_ids, key, impl=impl)

        routers = []
        for block, block_key in zip(blocks, keys, strict=True):
            x, router = run_block(block, x, block_key)
            routers.append(router)
        return x, jax.tree.map(lambda *values: sum(values) / len(values), *routers)

    def layers(self) -> list[Block]:
        """Returns the blocks in order, each with the feed-forward that it uses."""
        if self.shared is None:
            return list(self.blocks)
        blocks = []
        for i, block in enumerate(self.blocks):
            # A copy with the same arrays: the stored block keeps no feed-forward.
            block = jax.tree.map(lambda leaf: leaf, block)
            block.mlp = nnx.data(self.shared[i // self.group])
            blocks.append(block)
        return blocks


def unrolled(
    stack: Stack, take: Callable[[tuple, jax.Array, int], list[jax.Array]]
) -> UnrolledStack:
    """Takes a stack apart.

    Args:
      stack: as it was trained.
      take: (path, array [n, ...], n) -> the n arrays [...], for each stacked array of a block.
    """

    def take_apart(module, count):
        leaves, tree = jax.tree_util.tree_flatten_with_path(module)
        parts_of_leaf = [take(path, leaf, count) for path, leaf in leaves]
        parts_of_module = zip(*parts_of_leaf, strict=True)
        return [jax.tree.unflatten(tree, list(parts)) for parts in parts_of_module]

    repeats = stack.num_layers // len(stack.blocks)
    blocks = _in_order([take_apart(block, repeats) for block in stack.blocks])
    shared = None
    if stack.shared is not None:
        shared = _in_order([take_apart(mlp, repeats) for mlp in stack.shared])
    return UnrolledStack(blocks, shared, stack.group)


def _in_order(modules: list[list]) -> list:
    """Returns all modules in the order of the layers.

    Args:
      modules: for each position in the pattern, the modules of all repetitions.
    """
    return [module for repetition in zip(*modules, strict=True) for module in repetition]
