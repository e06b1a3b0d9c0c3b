"""Tokens on their way to experts that lie on several devices, and back.

Letters: n tokens of a device, X devices of the axis "expert", E experts, D model width.

Two ways, both exact:

- gathered: every device gets the n X tokens of all, computes what its E / X experts add to them,
  and the sums are scattered. A device receives n X D numbers, whatever the router chose.
- exchanged: a device sends each token once to each device that has one of its experts, and gets
  one sum back from each. Shapes are static, so it sends the same number C of rows to every device:
  it receives C X D numbers each way.

With `top` experts a token and even routing a token visits a given device with probability p, about
top / X. C is SLACK p n: the smaller it is, the less is sent and the more often more than C tokens
of a device want to go to one other. No token may be dropped, so if that happens anywhere, the
layer gathers instead, for that batch alone. A capacity that can never overflow is C = n, which
sends as much as gathering; where C is near n, tokens are always gathered. What the fallback costs:
the program has both ways in it, the compiler plans the memory of the larger one, which is
gathering, and the backward pass computes the experts again.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qkvjax.parallel.rules import RULES, axes_of, gather, has_mesh, names_of

SLACK = 1.25  # capacity over what even routing needs
WORTHWHILE = 0.75  # tokens are exchanged where C is at most this part of n


def capacity(tokens: int, ways: int, experts: int, top: int) -> int:
    """The rows that a device sends to each of `ways` devices, at most `tokens`."""
    others = experts - experts // ways
    elsewhere = math.comb(others, top) / math.comb(experts, top)
    return min(tokens, math.ceil(SLACK * (1 - elsewhere) * tokens))


def on_experts(
    f, x: jax.Array, gates: jax.Array, weights: dict[str, jax.Array], top: int
) -> jax.Array:
    """f(first, x, gates, weights), summed over experts: [B, T, D] -> [B, T, D].

    Args:
      f: what the experts first, first + 1, ... of `weights` add to tokens [B, T, D].
      x: [B, T, D].
      gates: [B, T, E], the weight of each expert; 0 but for `top` of them.
      weights: matrices [E, rows, columns], shared out as their types say.
      top: experts of a token.
    """
    if not has_mesh():
        return f(0, x, gates, weights)
    weights = {name: gather(w) for name, w in weights.items()}
    sizes = jax.sharding.get_abstract_mesh().shape
    (expert,), (tensor,) = RULES["experts"], RULES["mlp"]
    rows, columns = axes_of(x)[:2]
    tokens = PartitionSpec(rows, columns)
    several = sizes[expert] > 1
    spread = expert in names_of(rows)  # else every device has the tokens already

    def local(x, gates, weights):
        shape = x.shape
        x, gates = x.reshape(-1, shape[-1]), gates.reshape(-1, gates.shape[-1])
        if several and spread:
            y = _visit(_of_rows(f), expert, top, x, gates, weights)
        else:
            y = _of_rows(f)(_first(expert, gates) if several else 0, x, gates, weights)
            y = jax.lax.psum(y, expert) if several else y
        if any(tensor in tuple(place) for place in where.values()):
            y = jax.lax.psum(y, tensor)
        return y.reshape(shape)

    where = {name: jax.typeof(w).sharding.spec for name, w in weights.items()}
    run = jax.shard_map(local, in_specs=(tokens, tokens, where), out_specs=tokens, check_vma=False)
    return run(x, gates, weights)


def _of_rows(f):
    """f for tokens [n, D] and gates [n, E]."""
    return lambda first, x, gates, weights: f(first, x[None], gates[None], weights)[0]


def _visit(f, expert: str, top: int, x, gates, weights) -> jax.Array:
    """What all experts add to a device's tokens [n, D]; `f` is of rows."""
    ways = jax.lax.axis_size(expert)
    count, experts = gates.shape
    rows = capacity(count, ways, experts, top)
    if rows > WORTHWHILE * count:
        return _gathered(f, expert, None, x, gates, weights)
    wanted = jnp.any(gates.reshape(count, ways, -1) > 0, axis=-1)  # [n, X]
    # All devices of the mesh go the same way, so that each meets the others in its collectives.
    overflows = jax.lax.pmax(
        jnp.max(jnp.sum(wanted, axis=0)) > rows, tuple(jax.sharding.get_abstract_mesh().shape)
    )

    ways_there = (
        functools.partial(_gathered, f, expert),
        functools.partial(_exchanged, f, expert, rows),
    )
    return _either(ways_there, overflows, wanted, x, gates, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _either(ways_there, overflows, wanted, x, gates, weights):
    """The first of two functions of the last four arguments where `overflows`, else the second.

    Differentiated as usual, a conditional hands what the gradients of both branches need from the
    forward pass to the backward pass, copies of the weights among it. Here the backward pass
    computes the branch again, and keeps the arguments alone.
    """
    return jax.lax.cond(overflows, *ways_there, wanted, x, gates, weights)


def _either_forward(ways_there, overflows, *arguments):
    return _either(ways_there, overflows, *arguments), (overflows, arguments)


def _either_backward(ways_there, kept, dy):
    overflows, (wanted, *arguments) = kept

    def gradient(way):
        def pulled(wanted, dy, *arguments):
            return jax.vjp(functools.partial(way, wanted), *arguments)[1](dy)

        return pulled

    found = jax.lax.cond(overflows, *map(gradient, ways_there), wanted, dy, *arguments)
    return None, None, *found


_either.defvjp(_either_forward, _either_backward)


def _first(expert: str, gates):
    """The number of a device's first expert, of gates [n, E]."""
    return jax.lax.axis_index(expert) * (gates.shape[-1] // jax.lax.axis_size(expert))


def _gathered(f, expert: str, wanted, x, gates, weights):
    first = _first(expert, gates)
    x, gates = (jax.lax.all_gather(array, expert, tiled=True) for array in (x, gates))
    return jax.lax.psum_scatter(f(first, x, gates, weights), expert, tiled=True)


def _exchanged(f, expert: str, rows: int, wanted, x, gates, weights):
    """Sends at most `rows` tokens to each device; `wanted`, bool [n, X], says which."""
    (count, width), ways = x.shape, wanted.shape[1]
    # The token in each row that goes to each device, [X, C]; n, a token of zeros, where none does.
    row = jnp.where(wanted, jnp.cumsum(wanted, axis=0) - 1, rows)
    token = jnp.full((ways, rows), count)
    of_device = jnp.broadcast_to(jnp.arange(ways), row.shape)
    token = token.at[of_device, row].set(jnp.arange(count)[:, None], mode="drop")

    def send(array):  # [X, C, ...] -> [X, C, ...] of what each device sent here
        return jax.lax.all_to_all(array, expert, 0, 0, tiled=True)

    def filled(array):  # with a token of zeros at the end
        return jnp.pad(array, [(0, 1)] + [(0, 0)] * (array.ndim - 1))

    by_device = filled(gates.reshape(count, ways, -1))
    their_gates = send(by_device[token, jnp.arange(ways)[:, None]])  # [X, C, E / X]
    arrived = send(filled(x)[token]).reshape(-1, width)
    whole = jnp.zeros((ways * rows, gates.shape[1]), gates.dtype)
    mine = their_gates.reshape(ways * rows, -1)
    first = _first(expert, gates)
    whole = jax.lax.dynamic_update_slice_in_dim(whole, mine, first, axis=1)
    y = f(first, arrived, whole, weights)
    back = send(y.reshape(ways, rows, width))
    return jnp.zeros((count + 1, width), y.dtype).at[token].add(back)[:count]
