"""Small arrays of a train state, put together where they are saved.

Orbax takes about a millisecond of Python for each array, which for all arrays of a small model is
longer than a step. So those that have shape, dtype and sharding in common are saved as one; the
manifest says which.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from qkvjax.parallel import rules

SMALL = 2**20  # bytes; a copy of what is smaller costs neither time nor memory

Groups = Mapping[str, list[str]]  # name of a stack [n, ...] -> the n names of its arrays [...]


def groups(arrays: Mapping[str, jax.Array]) -> Groups:
    """What to put together of these arrays."""
    alike = {}
    for name, x in arrays.items():
        if x.nbytes < SMALL:
            alike.setdefault((x.shape, x.dtype, x.sharding), []).append(name)
    several = [names for names in alike.values() if len(names) > 1]
    return {f"stacks.{i}": names for i, names in enumerate(several)}


def joined(arrays: Mapping[str, jax.Array], groups: Groups) -> dict[str, jax.Array]:
    """The arrays, with stacks instead of those that are in one."""
    alone = dict(arrays)
    members = {stack: [alone.pop(name) for name in names] for stack, names in groups.items()}
    return alone | _stacked(members)


_stacked = jax.jit(lambda members: {stack: jnp.stack(parts) for stack, parts in members.items()})


def abstract(wanted: Mapping[str, jax.ShapeDtypeStruct], groups: Groups) -> dict:
    """What to read, in order to have what is wanted; all with shardings."""
    read = dict(wanted)
    for stack, names in groups.items():
        if parts := [read.pop(name) for name in names if name in wanted]:
            read[stack] = rules.stacked(parts[0], len(names))
    return read


def parted(read: Mapping[str, jax.Array], groups: Groups, wanted: Mapping) -> dict[str, jax.Array]:
    """What is wanted, of what `abstract` said to read."""
    places = {
        name: (stack, i)
        for stack, names in groups.items()
        for i, name in enumerate(names)
        if name in wanted
    }
    out = {name: wanted[name].sharding for name in places}
    cut = jax.jit(lambda held: {n: held[s][i] for n, (s, i) in places.items()}, out_shardings=out)
    stacks = {stack: read[stack] for stack, _ in places.values()}
    return {name: x for name, x in read.items() if name not in stacks} | cut(stacks)
