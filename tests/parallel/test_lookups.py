"""Heads and rows of a vocabulary that are spread over devices: each one is found once."""

import jax
import jax.numpy as jnp
import numpy as np
from processes import print_result, run_program

from qkvjax.kernels import dispatch
from qkvjax.parallel import rules, tables
from qkvjax.parallel.mesh import make_mesh

V, D = 24, 3


def spread(x, *names):
    """The array, with axes of these names sharded over the mesh in force."""
    return jax.sharding.reshard(x, rules.spec(*names))


def embeddings():
    """Each id of the vocabulary, looked up in a table without a mesh and with sharded rows."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(V, D)), jnp.float32)
    ids = jnp.arange(V).reshape(2, V // 2)
    with jax.set_mesh(make_mesh({"tensor": 4})):
        sharded = tables.embed(spread(table, "vocab", None), spread(ids, None, None))
        sharded = np.asarray(sharded)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2})):
        copies = tables.copies(spread(table, "vocab", None))
        copied = np.asarray(tables.embed(copies, spread(ids, "batch", None)))
    expected = np.asarray(table[ids])
    return {
        "sharded": bool((sharded == expected).all()),
        "copies": bool((copied == expected).all()),
    }


def heads():
    """K = 2 key-value heads for N = 4 or 8 query heads on 4 devices: largest errors."""
    keys = jax.random.split(jax.random.key(0), 3)
    results = {}
    for num_heads in (4, 8):
        q = jax.random.normal(keys[0], (2, 5, num_heads, 8))
        k, v = (jax.random.normal(key, (2, 5, 2, 8)) for key in keys[1:])
        expected = np.asarray(dispatch.attention(q, k, v, impl="reference"))
        with jax.set_mesh(make_mesh({"tensor": 4})):
            q = spread(q, None, None, "heads", None)
            k, v = (spread(x, None, None, None, None) for x in (k, v))
            repeated = np.asarray(rules.spread_heads(k, num_heads))
            out = np.asarray(
                jax.jit(dispatch.attention, static_argnames="impl")(q, k, v, impl="xla")
            )
        results[str(num_heads)] = {
            "heads": float(abs(repeated - np.repeat(np.asarray(k), 2, axis=2)).max()),
            "attention": float(abs(out - expected).max()),
        }
    return results


def main():
    """Runs in a process with 4 devices."""
    print_result({"embeddings": embeddings(), "heads": heads()})


def test_heads_and_ids_on_four_devices(tmp_path):
    results = run_program(tmp_path, f"import {__name__} as t; t.main()", devices=4)
    # An id at the boundary of two devices' rows belongs to one of them.
    assert results["embeddings"] == {"sharded": True, "copies": True}
    # Head 0 twice and head 1 twice, not 0 1 0 1: so each device has the head of its queries.
    for errors in results["heads"].values():
        assert errors["heads"] == 0 and errors["attention"] < 1e-5
