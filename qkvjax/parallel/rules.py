"""Sharding rules: which named dimension is sharded over which mesh axes, and the resharding that
the model asks for.

This is the only file that names mesh axes. Which axis cuts what:

    axis      activations                parameters                     what devices exchange
    --------  -------------------------  -----------------------------  --------------------------
    replica   sequences (B)              nothing: whole copies          sums of gradients
    fsdp      sequences (B)              model width (D) of matrices    parameters before use,
                                                                        sums of gradients
    context   positions (T)              nothing                        keys and values,
                                                                        sums of gradients
    tensor    heads (N, K),              columns of q, k, v, up, gate;  one sum for each branch
              feed-forward width (F),    rows of output and down;       of a block; statistics of
              logits (V)                 vocabulary (V) of embedding    the logits
                                         and head
    expert    sequences (B)              experts (E)                    tokens, to their experts
                                                                        and back (experts.py)

Axes are Explicit: the type of an array says how it is sharded. Axes of size 1 are left out of every
type, so that on one device nothing is resharded. Without a mesh (in notebooks, in analysis) every
function here is the plain operation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

# Named dimension -> mesh axes.
RULES = {
    # Three axes hold different sequences. A layer that is not a mixture of experts uses "expert"
    # like "replica", so that these devices do not repeat each other's work.
    "batch": ("replica", "fsdp", "expert"),
    # A device holds a range of positions of each sequence; attention gathers keys and values.
    "length": ("context",),
    # FSDP: parameters are stored sharded along the model width and gathered just before use.
    # Activations are whole along the model width, so they never carry this name.
    "embed": ("fsdp",),
    # Attention heads are independent of each other, and so are the units of a feed-forward layer:
    # devices exchange nothing between the first and the last product of a branch. One array never
    # has two of these three dimensions, so that one axis can serve all of them.
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # Each device stores some of the experts; tokens travel to them.
    "experts": ("expert",),
    # `jax.lax.scan` over layers slices this dimension. Sharded, every slice would be a transfer
    # from the one device that has the layer.
    "layers": (),
}

# The names of the rows and columns of a matrix, by the part of the model that holds it.
#
#     x [B, T, D] @ up [D, F]    columns over "tensor": each device computes some of the units
#       [B, T, F] @ down [F, D]  rows over "tensor": each device has a part of the sum,
#                                and one sum over devices completes it
#
# The projections of q, k, v and the output projection pair up in the same way, with heads for F.
MATRICES = {
    "projections": ("embed", "heads"),
    "output": ("heads", "embed"),
    "up": ("embed", "mlp"),
    "gate": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
}


# ---- the mesh in force ------------------------------------------------------------------------


def has_mesh() -> bool:
    """Returns whether `jax.set_mesh` is in force.

    False inside `jax.shard_map`, where a device computes on its part alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not (mesh.empty or mesh.are_all_axes_manual)


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": what the program is compiled for.

    With a mesh that is the platform of its devices, which this machine need not have.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        return jax.default_backend()
    if device.device_kind == "cpu":
        return "cpu"
    return "tpu" if device.device_kind.startswith("TPU") else "gpu"


def ways(*names: str, sizes: Mapping[str, int] | None = None) -> int:
    """Returns over how many devices dimensions of these names are sharded.

    Args:
      sizes: of the mesh axes; None means those of the mesh in force.
    """
    if sizes is None:
        sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for name in names for axis in RULES[name])


def shards_sequence() -> bool:
    """Returns whether the mesh in force shards positions over devices."""
    return has_mesh() and ways("length") > 1


# ---- shardings by name ------------------------------------------------------------------------


def spec(*names: str | None, sizes: Mapping[str, int] | None = None) -> PartitionSpec:
    """Returns the PartitionSpec of an array whose dimensions have these names.

    Args:
      names: keys of RULES; None for a dimension that is not sharded.
      sizes: of the mesh axes; None means those of the mesh in force.

    Raises:
      ValueError: two dimensions would be sharded over the same axis.
    """
    if sizes is None:
        sizes = jax.sharding.get_abstract_mesh().shape
    entries = [tuple(axis for axis in RULES.get(name, ()) if sizes[axis] > 1) for name in names]
    used = [axis for axes in entries for axis in axes]
    if len(set(used)) < len(used):
        raise ValueError(f"dimensions {names} collide: {used}")
    return PartitionSpec(*(_entry(axes) for axes in entries))


def _entry(axes: tuple[str, ...]):
    """Returns an entry of a PartitionSpec in its shortest form: None, an axis or several axes."""
    if not axes:
        return None
    return axes[0] if len(axes) == 1 else axes


def sharding(mesh: jax.sharding.Mesh, *names: str | None) -> NamedSharding:
    """Returns the NamedSharding on `mesh` of an array whose dimensions have these names."""
    return NamedSharding(mesh, spec(*names, sizes=mesh.shape))


def matrix_spec(path: tuple[str, ...], shape: tuple[int, ...], sizes) -> PartitionSpec:
    """Returns how a parameter [..., rows, columns] is sharded.

    Each dimension follows MATRICES where the mesh divides its size and stays whole otherwise. A
    matrix that is not sharded over "embed" by then is sharded so along its larger free dimension
    that "embed" divides: FSDP saves memory with it whatever it means. Stacked layers stay whole.

    Args:
      path: names on the way to the parameter, such as ("mlp", "up", "weight").
      shape: at least two dimensions.
      sizes: of the mesh axes.
    """
    holder = next((name for name in path if name in MATRICES), None)
    wanted = MATRICES.get(holder, (None, None))
    matrix_shape = shape[-2:]
    names = [
        name if name is not None and _divides(name, size, sizes) else None
        for name, size in zip(wanted, matrix_shape, strict=True)
    ]
    if "embed" not in names:
        free_sizes = [
            size if name is None and _divides("embed", size, sizes) else 0
            for name, size in zip(names, matrix_shape, strict=True)
        ]
        if max(free_sizes) > 0:
            names[free_sizes.index(max(free_sizes))] = "embed"

    leading: list[str | None] = [None] * (len(shape) - 2)
    if "experts" in path:
        leading[-1] = "experts"  # [layers, experts, rows, columns]
    return spec(*leading, *names, sizes=sizes)


def _divides(name: str, size: int, sizes: Mapping[str, int]) -> bool:
    """Returns whether a dimension of this name and size can be sharded evenly."""
    return size % ways(name, sizes=sizes) == 0


def matrix_sharding(mesh: jax.sharding.Mesh, path: tuple[str, ...], shape) -> NamedSharding:
    """Returns the NamedSharding on `mesh` of the parameter at `path`; see `matrix_spec`."""
    return NamedSharding(mesh, matrix_spec(path, shape, mesh.shape))


def stacked(leaf: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    """Returns `count` arrays like `leaf`, stacked on a new first axis that is not sharded."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=sharding)


def cache_spec(sequences: int) -> PartitionSpec | None:
    """Returns the PartitionSpec of a cache [sequences or pages, heads, ...]; None without a mesh.

    Args:
      sequences: how many sequences share the cache.
    """
    return PartitionSpec(row_axes(sequences), *spec("heads")) if has_mesh() else None


# ---- shardings that arrays have ---------------------------------------------------------------


def axes_of(array: jax.Array) -> tuple:
    """Returns the entries of an array's PartitionSpec, one for each dimension; None where it is
    whole."""
    return tuple(jax.typeof(array).sharding.spec)


def names_of(axes) -> tuple:
    """Returns the mesh axes of one entry of a PartitionSpec as a tuple; (None,) for None."""
    return axes if isinstance(axes, tuple) else (axes,)


def row_axes(count: int):
    """Returns the mesh axes over which `count` sequences are sharded: those of "batch".

    None where they do not divide the count: every device then has all sequences.
    """
    divides = has_mesh() and count % ways("batch") == 0
    return spec("batch")[0] if divides else None


def row_ways(count: int) -> int:
    """Returns over how many devices `count` sequences are sharded."""
    return 1 if row_axes(count) is None else ways("batch")


# ---- resharding -------------------------------------------------------------------------------


def place_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """Reshards an array as `other`, of the same shape, is sharded."""
    if not has_mesh():
        return array
    return jax.sharding.reshard(array, jax.typeof(other).sharding.spec)


def spread_rows(array: jax.Array) -> jax.Array:
    """Reshards [B, ...] over "batch" as `row_axes` says; the other dimensions are whole."""
    if not has_mesh():
        return array
    return jax.sharding.reshard(array, PartitionSpec(row_axes(array.shape[0])))


def shard_rows_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """Reshards [B, ...] so that its sequences are on the devices of those of `like` [B, ...]; the
    other dimensions are whole."""
    if not has_mesh():
        return array
    return jax.sharding.reshard(array, PartitionSpec(axes_of(like)[0]))


def replicate(array: jax.Array) -> jax.Array:
    """Returns the array whole on each device, for a result that every process reads."""
    return jax.sharding.reshard(array, PartitionSpec()) if has_mesh() else array


def gather(array: jax.Array) -> jax.Array:
    """Returns a parameter as it is used: whole along "embed", as FSDP gathers it just before.

    Dimensions that other axes shard stay sharded.
    """
    if not has_mesh():
        return array
    kept = (None if axis in RULES["embed"] else axis for axis in axes_of(array))
    return jax.sharding.reshard(array, PartitionSpec(*kept))


def delay_gather(x, parameters):
    """Returns (x, parameters) unchanged, and keeps the compiler from gathering parameters before
    x is computed.

    Without the barrier a program of unrolled layers may gather the parameters of all layers at its
    start, and a loop those of its body before the first round: every device would hold the whole
    model at once.
    """
    if not has_mesh() or ways("embed") == 1:
        return x, parameters
    return jax.lax.optimization_barrier((x, parameters))


def gather_columns(x_BTV: jax.Array) -> jax.Array:
    """Returns [B, T, V] whole along its last axis."""
    if not has_mesh():
        return x_BTV
    return jax.sharding.reshard(x_BTV, PartitionSpec(*axes_of(x_BTV)[:2], None))


def gather_sequence(array: jax.Array) -> jax.Array:
    """Returns keys, values, positions, ... [B, S, ...] whole along S, the sequence."""
    if not has_mesh():
        return array
    rows, _, *rest = axes_of(array)
    return jax.sharding.reshard(array, PartitionSpec(rows, None, *rest))


# ---- heads ------------------------------------------------------------------------------------


def split_heads(x_BTF: jax.Array, heads: int) -> jax.Array:
    """Reshapes [B, T, N*H] to [B, T, N, H].

    Heads are sharded where "tensor" divides their number; otherwise every device has all of them.
    """
    shape = (*x_BTF.shape[:2], heads, x_BTF.shape[2] // heads)
    if not has_mesh():
        return x_BTF.reshape(shape)
    name = None if heads % ways("heads") else "heads"
    result = PartitionSpec(*axes_of(x_BTF)[:2], *spec(name))
    # The columns may be sharded even where the heads cannot be: a boundary between devices would
    # then lie within a head, and the reshape has no sharding for that.
    x_BTF = jax.sharding.reshard(x_BTF, result)
    return jax.lax.reshape(x_BTF, shape, out_sharding=PartitionSpec(*result, None))


def merge_heads(x_BTNH: jax.Array) -> jax.Array:
    """Reshapes [B, T, N, H] to [B, T, N*H], whose columns are sharded as heads are."""
    batch, length, heads, width = x_BTNH.shape
    shape = (batch, length, heads * width)
    if not has_mesh():
        return x_BTNH.reshape(shape)
    result = PartitionSpec(*axes_of(x_BTNH)[:2], *spec("heads"))
    return jax.lax.reshape(x_BTNH, shape, out_sharding=result)


def num_spread_heads(heads: int) -> int:
    """Returns the number of heads that `spread_heads` makes of K key-value heads."""
    return math.lcm(heads, ways("heads")) if has_mesh() else heads


def spread_heads(x_BSKH: jax.Array, heads: int) -> jax.Array:
    """Shards key-value heads as `heads` query heads are sharded: [B, S, K, H] -> [B, S, K', H].

    Where the devices do not divide K, each head is repeated until they do: K' is the least common
    multiple of K and the devices, so that each device has the heads that its queries read and no
    others. K=2 key-value heads and N=8 query heads on 4 devices:

        device            0      1      2      3
        query heads       0 1    2 3    4 5    6 7
        key-value heads   0      0      1      1       (K' = 4: each head twice)
    """
    if not has_mesh() or ways("heads") == 1:
        return x_BSKH
    kv_heads = x_BSKH.shape[2]
    repeats = num_spread_heads(kv_heads) // kv_heads
    if repeats > 1:
        assert heads % (kv_heads * repeats) == 0, (heads, kv_heads, repeats)
        x_BSKH = jnp.repeat(x_BSKH, repeats, axis=2)
    result = PartitionSpec(axes_of(x_BSKH)[0], None, *spec("heads", None))
    return jax.sharding.reshard(x_BSKH, result)
