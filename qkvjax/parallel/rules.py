"""The only file that names mesh axes: where each named dimension lives, and the four places
where the model has to say so.

Without a mesh (notebooks, analysis) every helper is the plain operation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

# Named dimension -> mesh axes. Parameters are sharded over "embed", never over "layers".
RULES = {
    "batch": ("replica", "fsdp"),
    "length": "context",
    "embed": "fsdp",
    "heads": None,
    "mlp": None,
    "vocab": None,
    "layers": None,
}


def spec(*names: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry these names (None: not sharded)."""
    return PartitionSpec(*(RULES[name] if name else None for name in names))


def has_mesh() -> bool:
    """Whether `jax.set_mesh` is in force."""
    return not jax.sharding.get_abstract_mesh().empty


def shards_sequence() -> bool:
    """Whether the mesh in force spreads sequences over devices."""
    return has_mesh() and jax.sharding.get_abstract_mesh().shape["context"] > 1


def sharding(mesh: jax.sharding.Mesh, *names: str | None) -> NamedSharding:
    """The NamedSharding of such an array on `mesh`."""
    return NamedSharding(mesh, spec(*names))


def gather(array: jax.Array) -> jax.Array:
    """A parameter whole on every device, as FSDP does just before using it."""
    if not has_mesh():
        return array
    return jax.sharding.reshard(array, PartitionSpec(*(None,) * array.ndim))


def embed(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Looks ids up in a table: [V, D], int [B, T] -> [B, T, D]."""
    if not has_mesh():
        return table_VD[ids_BT]
    return gather(table_VD).at[ids_BT].get(out_sharding=spec("batch", "length", None))


def lookup(table_S: jax.Array, places_BS: jax.Array) -> jax.Array:
    """Numbers of a table [S] at places int [B, S], sharded as these are: [B, S]."""
    if not has_mesh():
        return table_S[places_BS]
    return table_S.at[places_BS].get(out_sharding=jax.typeof(places_BS).sharding.spec)


@jax.custom_jvp
def _turned(w: jax.Array) -> jax.Array:
    """w, whose gradient is computed as its transpose.

    XLA's CPU multiplies [F, n] by [n, D] 1.8 times as fast as the transposes when F < D (one core,
    768 tokens, 128 by 512). The barriers keep it from seeing that the two are one.
    """
    return w


@_turned.defjvp
def _turned_jvp(primals, tangents):
    hidden = jax.lax.optimization_barrier
    return primals[0], hidden(hidden(tangents[0].T).T)


def matmul(x_BTD: jax.Array, w_DF: jax.Array, dtype=None) -> jax.Array:
    """[B, T, D] @ [D, F] -> [B, T, F], in `dtype` if one is given.

    Tokens are flattened to one axis first: XLA's CPU takes a slow path for weight gradients
    that contract over two axes (1.5 times the step of a small model). Where the sequence is
    sharded the reshape would move data, so it is left alone.
    """
    w_DF = gather(w_DF)
    if w_DF.shape[0] > w_DF.shape[1] and jax.default_backend() == "cpu":
        w_DF = _turned(w_DF)
    batch, length, width = x_BTD.shape
    if not has_mesh():
        flat = jnp.matmul(x_BTD.reshape(-1, width), w_DF, preferred_element_type=dtype)
        return flat.reshape(batch, length, -1)
    if shards_sequence():
        return jnp.einsum(
            "btd,df->btf", x_BTD, w_DF, out_sharding=spec("batch", "length", None),
            preferred_element_type=dtype,
        )  # fmt: skip
    flat = jax.lax.reshape(x_BTD, (batch * length, width), out_sharding=spec("batch", None))
    flat = jnp.matmul(flat, w_DF, out_sharding=spec("batch", None), preferred_element_type=dtype)
    out = (batch, length, w_DF.shape[1])
    return jax.lax.reshape(flat, out, out_sharding=spec("batch", "length", None))


def map_tokens(f, whole: jax.Array, *by_token: jax.Array):
    """f(whole, *by_token) -> (of tokens, totals), on each device's own tokens.

    `by_token` and what f returns of tokens are [B, T, ...] and stay where they are; each device
    has all of `whole`, and totals are summed over devices.
    """
    if not has_mesh():
        return f(whole, *by_token)

    sizes = jax.sharding.get_abstract_mesh().shape
    spread = tuple(axis for axis in (*RULES["batch"], RULES["length"]) if sizes[axis] > 1)

    def local(*arrays):
        of_tokens, totals = f(*arrays)
        return of_tokens, jax.lax.psum(totals, spread) if spread else totals

    tokens = spec("batch", "length")
    in_specs = (PartitionSpec(), *(tokens for _ in by_token))
    out_specs = (tokens, PartitionSpec())
    run = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return run(gather(whole), *by_token)


def on_each_device(f, x: jax.Array, arrays: dict[str, object]) -> jax.Array:
    """f(x, **arrays) on each device's part of a batch: for kernels, which know no mesh.

    `arrays` are trees of arrays, or None.

    The result lies as x does.
    """
    if not has_mesh():
        return f(x, **arrays)
    given = {name: array for name, array in arrays.items() if array is not None}
    where = lambda array: jax.typeof(array).sharding.spec  # noqa: E731
    run = jax.shard_map(
        lambda x, given: f(x, **given),
        in_specs=(where(x), jax.tree.map(where, given)), out_specs=where(x), check_vma=False,
    )  # fmt: skip
    return run(x, given)


def split_heads(x_BTF: jax.Array, heads: int) -> jax.Array:
    """[B, T, N*H] -> [B, T, N, H]."""
    shape = (*x_BTF.shape[:2], heads, x_BTF.shape[2] // heads)
    if not has_mesh():
        return x_BTF.reshape(shape)
    return jax.lax.reshape(x_BTF, shape, out_sharding=spec("batch", "length", "heads", None))


def merge_heads(x_BTNH: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, T, N*H]."""
    batch, length, heads, width = x_BTNH.shape
    if not has_mesh():
        return x_BTNH.reshape(batch, length, heads * width)
    shape = (batch, length, heads * width)
    return jax.lax.reshape(x_BTNH, shape, out_sharding=spec("batch", "length", None))


def gather_sequence(array: jax.Array) -> jax.Array:
    """Keys, values, positions and the like whole along their second axis, the sequence."""
    if not has_mesh():
        return array
    return jax.sharding.reshard(array, spec("batch", *(None,) * (array.ndim - 1)))
