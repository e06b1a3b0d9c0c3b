"""How tokens reach experts that are on other devices, and how the results come back.

Letters: n tokens of a device, X devices of the axis "expert", E experts, D model width, C rows that
a device sends to each device.

There are two ways. Both are exact: no token is dropped.

Gathered. Every device gets the n X tokens of all devices and computes what its E / X experts add to
them; the sums return to the devices of the tokens. With n = 2, X = 2:

    device 0: tokens a b              device 1: tokens c d
        +------- all_gather: tokens and gates -------+
    a b c d -> experts of device 0    a b c d -> experts of device 1
        +------- psum_scatter: sums over devices ----+
    sums of a b                       sums of c d

A device receives n X D numbers, whatever the router chose.

Exchanged. A device sends each token once to each device that has one of its experts, and gets one
sum back from each. Shapes are static, so it sends C rows to every device, some of them empty (-).
Where a, b and c need experts of device 0, and b and d experts of device 1, with C = 2:

                     device 0: tokens a b     device 1: tokens c d
    to device 0      a b                      c -
    to device 1      b -                      d -
                         +------- all_to_all -------+
    received         a b, c -                 b -, d -
                     -> experts of device 0   -> experts of device 1
                         +------- all_to_all -------+
    sums returned    a b from 0, b - from 1   c - from 0, d - from 1
    added up         a + 0, b + b             c + 0, d + 0

A device receives C X D numbers each way.

With `top` experts a token and even routing, a token visits a given device with probability p, about
top / X, and C is SLACK p n. The smaller C is, the less is sent, and the more often more than C
tokens of a device need one other device. If that happens anywhere, the layer gathers instead, for
that batch alone. A capacity that can never overflow is C = n, which sends as much as gathering;
where C is near n, tokens are always gathered.

The fallback costs something. The program contains both ways, the compiler plans memory for the
larger one, which is gathering, and the backward pass computes the experts again.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qkvjax.parallel.rules import RULES, axes_of, gather, has_mesh, names_of

SLACK = 1.25  # capacity relative to what even routing needs
WORTHWHILE = 0.75  # tokens are exchanged where C is at most this part of n


def capacity(tokens: int, ways: int, experts: int, top: int) -> int:
    """Returns C, the rows that a device sends to each of `ways` devices; at most `tokens`.

    Args:
      tokens: of a device, n.
      ways: devices of the axis "expert", X.
      experts: in all, E.
      top: experts of a token.
    """
    on_other_devices = experts - experts // ways
    # Even routing: each choice of `top` experts is equally likely.
    avoids_a_device = math.comb(on_other_devices, top) / math.comb(experts, top)
    return min(tokens, math.ceil(SLACK * (1 - avoids_a_device) * tokens))


def on_experts(
    f, x: jax.Array, gates: jax.Array, weights: dict[str, jax.Array], top: int
) -> jax.Array:
    """Returns f(first, x, gates, weights) summed over all experts: [B, T, D] -> [B, T, D].

    Args:
      f: returns what the experts first, first + 1, ... of `weights` add to tokens [B, T, D].
      x: [B, T, D].
      gates: [B, T, E], the weight of each expert; 0 for all but `top` of them.
      weights: matrices [E, rows, columns], sharded as their types say.
      top: experts of a token.
    """
    if not has_mesh():
        return f(0, x, gates, weights)
    weights = {name: gather(w) for name, w in weights.items()}
    weight_specs = {name: jax.typeof(w).sharding.spec for name, w in weights.items()}
    sizes = jax.sharding.get_abstract_mesh().shape
    (expert_axis,) = RULES["experts"]
    (tensor_axis,) = RULES["mlp"]
    rows, positions = axes_of(x)[:2]
    tokens = PartitionSpec(rows, positions)
    experts_are_sharded = sizes[expert_axis] > 1
    tokens_are_sharded = expert_axis in names_of(rows)
    columns_are_sharded = any(tensor_axis in tuple(spec) for spec in weight_specs.values())

    def local(x, gates, weights):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        gates = gates.reshape(-1, gates.shape[-1])
        if experts_are_sharded and tokens_are_sharded:
            y = _visit(_of_rows(f), expert_axis, top, x, gates, weights)
        elif experts_are_sharded:
            # Every device of the axis has all these tokens already.
            y = _of_rows(f)(_first_expert(expert_axis, gates), x, gates, weights)
            y = jax.lax.psum(y, expert_axis)
        else:
            y = _of_rows(f)(0, x, gates, weights)
        if columns_are_sharded:
            y = jax.lax.psum(y, tensor_axis)
        return y.reshape(shape)

    run = jax.shard_map(
        local, in_specs=(tokens, tokens, weight_specs), out_specs=tokens, check_vma=False
    )
    return run(x, gates, weights)


def _of_rows(f):
    """Returns f for tokens [n, D] and gates [n, E]."""
    return lambda first, x, gates, weights: f(first, x[None], gates[None], weights)[0]


def _first_expert(axis: str, gates):
    """Returns the index of this device's first expert, from gates [n, E]."""
    return jax.lax.axis_index(axis) * (gates.shape[-1] // jax.lax.axis_size(axis))


# ---- the choice between the two ways ----------------------------------------------------------


def _visit(f, axis: str, top: int, x, gates, weights) -> jax.Array:
    """Returns what all experts add to this device's tokens, [n, D].

    Args:
      f: as in `on_experts`, of tokens [n, D] and gates [n, E].
      axis: "expert", over which tokens and experts are sharded.
    """
    ways = jax.lax.axis_size(axis)
    count, experts = gates.shape
    rows = capacity(count, ways, experts, top)
    if rows > WORTHWHILE * count:
        return _gathered(f, axis, None, x, gates, weights)
    wanted = jnp.any(gates.reshape(count, ways, -1) > 0, axis=-1)  # [n, X]
    # The maximum over all axes of the mesh: every device takes the same branch, so that each one
    # meets the others in the collectives of that branch.
    overflows = jax.lax.pmax(
        jnp.max(jnp.sum(wanted, axis=0)) > rows, tuple(jax.sharding.get_abstract_mesh().shape)
    )
    branches = (
        functools.partial(_gathered, f, axis),
        functools.partial(_exchanged, f, axis, rows),
    )
    return _either(branches, overflows, wanted, x, gates, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _either(branches, overflows, wanted, x, gates, weights):
    """Calls the first of two functions of the last four arguments where `overflows`, else the
    second.

    The usual derivative of a conditional keeps, from the forward pass to the backward pass, what
    the gradients of both branches need, copies of the weights among it. Here the arguments alone
    are kept, and the backward pass computes the branch again.
    """
    return jax.lax.cond(overflows, *branches, wanted, x, gates, weights)


def _either_forward(branches, overflows, *arguments):
    return _either(branches, overflows, *arguments), (overflows, arguments)


def _either_backward(branches, kept, dy):
    overflows, (wanted, *arguments) = kept

    def gradient_of(branch):
        def gradient(wanted, dy, *arguments):
            _, pull_back = jax.vjp(functools.partial(branch, wanted), *arguments)
            return pull_back(dy)

        return gradient

    gradients = jax.lax.cond(overflows, *map(gradient_of, branches), wanted, dy, *arguments)
    return None, None, *gradients


_either.defvjp(_either_forward, _either_backward)


# ---- gathered ---------------------------------------------------------------------------------


def _gathered(f, axis: str, wanted, x, gates, weights):
    """Computes every token on every device; `wanted` is not read."""
    first = _first_expert(axis, gates)
    all_x = jax.lax.all_gather(x, axis, tiled=True)
    all_gates = jax.lax.all_gather(gates, axis, tiled=True)
    return jax.lax.psum_scatter(f(first, all_x, all_gates, weights), axis, tiled=True)


# ---- exchanged --------------------------------------------------------------------------------


def _exchanged(f, axis: str, rows: int, wanted, x, gates, weights):
    """Sends each token to the devices that have its experts, at most `rows` tokens to each.

    Args:
      wanted: bool [n, X], which devices have an expert of a token.
    """
    count, width = x.shape
    ways = wanted.shape[1]
    experts = gates.shape[1]
    token = _tokens_to_send(wanted, rows)  # [X, C]

    # To each device its tokens, and of their gates those of its experts.
    arrived = _send(_with_empty_row(x)[token], axis).reshape(ways * rows, width)
    gates_by_device = _with_empty_row(gates.reshape(count, ways, experts // ways))
    local_gates = _send(gates_by_device[token, jnp.arange(ways)[:, None]], axis)  # [X, C, E / X]

    # `f` takes gates of all experts: those of other devices' experts are zero.
    first = _first_expert(axis, gates)
    all_gates = jnp.zeros((ways * rows, experts), gates.dtype)
    all_gates = jax.lax.dynamic_update_slice_in_dim(
        all_gates, local_gates.reshape(ways * rows, -1), first, axis=1
    )
    y = f(first, arrived, all_gates, weights)

    # The sums return in the rows in which the tokens were sent. Those of empty rows are added to
    # the token n, which is cut off.
    returned = _send(y.reshape(ways, rows, width), axis)
    return jnp.zeros((count + 1, width), y.dtype).at[token].add(returned)[:count]


def _tokens_to_send(wanted, rows: int):
    """Returns the token in each row that goes to each device: bool [n, X] -> int [X, C].

    An empty row has the index n, one behind the last token.
    """
    count, ways = wanted.shape
    # The tokens of a device fill its rows in order; the row C means that a token is not sent.
    row = jnp.where(wanted, jnp.cumsum(wanted, axis=0) - 1, rows)
    device = jnp.broadcast_to(jnp.arange(ways), row.shape)
    token = jnp.full((ways, rows), count)
    return token.at[device, row].set(jnp.arange(count)[:, None], mode="drop")


def _send(array, axis: str):
    """Exchanges [X, C, ...], whose entry i goes to device i: the entry i of the result is what
    device i sent here."""
    return jax.lax.all_to_all(array, axis, 0, 0, tiled=True)


def _with_empty_row(array):
    """Returns [n, ...] with a row of zeros behind the last."""
    return jnp.pad(array, [(0, 1)] + [(0, 0)] * (array.ndim - 1))
