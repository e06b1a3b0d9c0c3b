"""The only file that names mesh axes: where each named dimension lives, and the few places
where the model has to say so.

Axes of size 1 are in no array's type, so that one device asks nothing of anybody. Without a mesh
(notebooks, analysis) every helper is the plain operation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

# Named dimension -> mesh axes. Parameters are sharded over "embed", never over "layers".
RULES = {
    "batch": ("replica", "fsdp", "expert"),
    "length": ("context",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "vocab": ("tensor",),
    "layers": (),
}
# The two dimensions of a matrix by the name of what holds it. Heads and feed-forward are split by
# columns and put together by rows, so that a block talks once for each of its branches.
MATRICES = {
    "projections": ("embed", "heads"),
    "output": ("heads", "embed"),
    "up": ("embed", "mlp"),
    "gate": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
}


def spec(*names: str | None, sizes: Mapping[str, int] | None = None) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry these names (None: not sharded).

    Args:
      sizes: of the mesh axes; None means those of the mesh in force.

    Raises:
      ValueError: two dimensions would live on one axis.
    """
    sizes = jax.sharding.get_abstract_mesh().shape if sizes is None else sizes
    found = [tuple(axis for axis in RULES.get(name, ()) if sizes[axis] > 1) for name in names]
    used = [axis for axes in found for axis in axes]
    if len(set(used)) < len(used):
        raise ValueError(f"dimensions {names} collide: {used}")
    one_or_all = (axes[0] if len(axes) == 1 else axes or None for axes in found)
    return PartitionSpec(*one_or_all)


def ways(*names: str, sizes: Mapping[str, int] | None = None) -> int:
    """Over how many devices dimensions of these names are spread."""
    sizes = jax.sharding.get_abstract_mesh().shape if sizes is None else sizes
    return math.prod(sizes[axis] for name in names for axis in RULES[name])


def matrix_spec(path: tuple[str, ...], shape: tuple[int, ...], sizes) -> PartitionSpec:
    """Where a matrix lives: [..., rows, columns], of the parameter at `path`.

    What MATRICES says, as far as the mesh divides the sizes; else the larger dimension that
    "embed" divides, never the axis of stacked layers.
    """
    holder = next((name for name in path if name in MATRICES), None)
    names = list(MATRICES.get(holder, (None, None)))
    fits = lambda name, size: size % ways(name, sizes=sizes) == 0  # noqa: E731
    names = [n if n and fits(n, size) else None for n, size in zip(names, shape[-2:], strict=True)]
    if "embed" not in names:
        free = [
            size if name is None and fits("embed", size) else 0
            for name, size in zip(names, shape[-2:], strict=True)
        ]
        if max(free):
            names[free.index(max(free))] = "embed"
    before = [None] * (len(shape) - 2)
    if "experts" in path:
        before[-1] = "experts"
    return spec(*before, *names, sizes=sizes)


def has_mesh() -> bool:
    """Whether `jax.set_mesh` is in force; not inside `jax.shard_map`, where a device computes on
    its part alone."""
    mesh = jax.sharding.get_abstract_mesh()
    return not (mesh.empty or mesh.are_all_axes_manual)


def platform() -> str:
    """What the program is compiled for: the mesh's devices, which need not be here."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind
    return "cpu" if kind == "cpu" else "tpu" if kind.startswith("TPU") else "gpu"


def shards_sequence() -> bool:
    """Whether the mesh in force spreads sequences over devices."""
    return has_mesh() and ways("length") > 1


def sharding(mesh: jax.sharding.Mesh, *names: str | None) -> NamedSharding:
    """The NamedSharding of such an array on `mesh`."""
    return NamedSharding(mesh, spec(*names, sizes=mesh.shape))


def matrix_sharding(mesh: jax.sharding.Mesh, path: tuple[str, ...], shape) -> NamedSharding:
    """The NamedSharding of the matrix at `path` on `mesh`."""
    return NamedSharding(mesh, matrix_spec(path, shape, mesh.shape))


def stacked(leaf: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    """So many arrays like this one, on a new first axis that is not sharded."""
    place = leaf.sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec(None, *place.spec))
    return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=place)


def place_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """The array, spread over devices as another of its shape is."""
    if not has_mesh():
        return array
    return jax.sharding.reshard(array, jax.typeof(other).sharding.spec)


def axes_of(array: jax.Array) -> tuple:
    """The mesh axes over which each dimension of an array is sharded; None where it is whole."""
    return tuple(jax.typeof(array).sharding.spec)


def names_of(axes) -> tuple:
    """The mesh axes of one entry of a PartitionSpec."""
    return axes if isinstance(axes, tuple) else (axes,)


def row_axes(count: int):
    """The mesh axes over which `count` sequences are sharded: those of "batch", or None where they
    do not divide the count, so that every device has all sequences."""
    divides = has_mesh() and count % ways("batch") == 0
    return spec("batch")[0] if divides else None


def row_ways(count: int) -> int:
    """Over how many devices `count` sequences are sharded."""
    return 1 if row_axes(count) is None else ways("batch")


def spread_rows(array: jax.Array) -> jax.Array:
    """[B, ...] sharded over "batch" as `row_axes` says, whole in every other dimension."""
    if not has_mesh():
        return array
    return jax.sharding.reshard(array, PartitionSpec(row_axes(array.shape[0])))


def lie_as(array: jax.Array, like: jax.Array) -> jax.Array:
    """[B, ...] with its sequences sharded as those of `like` [B, ...] are, whole otherwise."""
    if not has_mesh():
        return array
    return jax.sharding.reshard(array, PartitionSpec(axes_of(like)[0]))


def cache_spec(sequences: int) -> PartitionSpec | None:
    """Where a cache of so many sequences lives, [sequences or pages, heads, ...]; None without a
    mesh."""
    return PartitionSpec(row_axes(sequences), *spec("heads")) if has_mesh() else None


def replicate(array: jax.Array) -> jax.Array:
    """A result that every process reads: whole on each device."""
    return jax.sharding.reshard(array, PartitionSpec()) if has_mesh() else array


def gather(array: jax.Array) -> jax.Array:
    """A parameter as it is used: whole over the axes of "embed", as FSDP does just before; what
    other axes share out stays so."""
    if not has_mesh():
        return array
    kept = (None if axis in RULES["embed"] else axis for axis in jax.typeof(array).sharding.spec)
    return jax.sharding.reshard(array, PartitionSpec(*kept))


def gathered_after(x, parameters):
    """(x, parameters), of which the compiler gathers the latter only when x is known.

    In a row of layers it would gather all of them at the start, and before a loop what the loop
    needs in each round: every device would have the whole model at once.
    """
    if not has_mesh() or ways("embed") == 1:
        return x, parameters
    return jax.lax.optimization_barrier((x, parameters))


def gather_columns(x_BTV: jax.Array) -> jax.Array:
    """[B, T, V] whole along its last axis."""
    if not has_mesh():
        return x_BTV
    return jax.sharding.reshard(x_BTV, PartitionSpec(*axes_of(x_BTV)[:2], None))


def split_heads(x_BTF: jax.Array, heads: int) -> jax.Array:
    """[B, T, N*H] -> [B, T, N, H]; every device has all heads where they cannot be shared out."""
    shape = (*x_BTF.shape[:2], heads, x_BTF.shape[2] // heads)
    if not has_mesh():
        return x_BTF.reshape(shape)
    name = None if heads % ways("heads") else "heads"
    result = PartitionSpec(*axes_of(x_BTF)[:2], *spec(name))
    x_BTF = jax.sharding.reshard(x_BTF, result)
    return jax.lax.reshape(x_BTF, shape, out_sharding=PartitionSpec(*result, None))


def num_spread_heads(heads: int) -> int:
    """How many heads `spread_heads` makes of K."""
    return math.lcm(heads, ways("heads")) if has_mesh() else heads


def spread_heads(x_BSKH: jax.Array, heads: int) -> jax.Array:
    """Key-value heads shared out like `heads` query heads: [B, S, K, H] -> [B, S, K', H].

    Where K does not divide, each head is repeated until it does: K' is the least common
    multiple, and each device holds the few heads that its queries see.
    """
    if not has_mesh() or ways("heads") == 1:
        return x_BSKH
    here = x_BSKH.shape[2]
    repeats = num_spread_heads(here) // here
    if repeats > 1:
        assert heads % (here * repeats) == 0, (heads, here, repeats)
        x_BSKH = jnp.repeat(x_BSKH, repeats, axis=2)
    place = PartitionSpec(axes_of(x_BSKH)[0], None, *spec("heads", None))
    return jax.sharding.reshard(x_BSKH, place)


def merge_heads(x_BTNH: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, T, N*H]."""
    batch, length, heads, width = x_BTNH.shape
    if not has_mesh():
        return x_BTNH.reshape(batch, length, heads * width)
    shape = (batch, length, heads * width)
    place = PartitionSpec(*axes_of(x_BTNH)[:2], *spec("heads"))
    return jax.lax.reshape(x_BTNH, shape, out_sharding=place)


def gather_sequence(array: jax.Array) -> jax.Array:
    """Keys, values, positions and the like whole along their second axis, the sequence."""
    if not has_mesh():
        return array
    rows, _, *rest = axes_of(array)
    return jax.sharding.reshard(array, PartitionSpec(rows, None, *rest))
