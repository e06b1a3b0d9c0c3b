"""How gradients are summed over devices: in which dtype, and how often."""

import re

import jax
from processes import print_result, run_program

from qkvjax import config as configs
from qkvjax.models.spec import model_spec
from qkvjax.parallel.mesh import make_mesh
from qkvjax.training.run import compile_for

VOCABULARY = 1000


def crossing(**fields):
    """[dtype, shape] of every array that the all-reduces of a train step sum, [V, D] among them.

    Read before XLA's CPU widens bfloat16, which it cannot sum.
    """
    config = configs.default()
    config.model.update(num_layers=2, d_model=32, num_heads=2)
    config.data.update(seq_len=16, batch_size=8)
    config.train.compute_dtype = "bfloat16"
    for name, value in fields.items():
        configs.set_field(config, name.replace("__", "."), value)
    spec = model_spec(configs.resolve(config).model, VOCABULARY, 16)
    step, _ = compile_for(configs.resolve(config), spec, make_mesh({"replica": 4}))
    sums = re.findall(r"= (.*) all-reduce(?:-start)?\(", step.as_text())
    arrays = re.findall(r"(\w+)\[([\d,]+)\]", " ".join(sums))
    return [[dtype, [int(n) for n in shape.split(",")]] for dtype, shape in arrays]


def main():
    """Runs in a process with 4 devices."""
    results = {"tied": crossing(), "untied": crossing(model__tie_embeddings=False)}
    print_result(results)


def test_gradients_cross_in_float32_and_a_tied_embedding_once(tmp_path):
    program = f"import {__name__} as t; t.main()"
    results = run_program(tmp_path, program, devices=4)
    for arrays in results.values():
        assert arrays
        assert {dtype for dtype, _ in arrays} == {"f32"}
    embedding = sorted([VOCABULARY, 32])
    count = {
        name: sum(sorted(shape) == embedding for _, shape in arrays)
        for name, arrays in results.items()
    }
    assert count == {"tied": 1, "untied": 2}


def test_products_have_the_gradients_of_plain_ones():
    """Of `products.matmul` with float32 parameters and bfloat16 tokens: each gradient has the dtype
    of its argument, and that of the parameter is summed in float32."""
    import jax.numpy as jnp
    import numpy as np

    from qkvjax.parallel.products import matmul

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 50, 16)).astype(jnp.bfloat16)
    w = jax.random.normal(keys[1], (16, 8))
    g = jax.random.normal(keys[2], (3, 50, 8)).astype(jnp.bfloat16)
    y, back = jax.vjp(matmul, x, w)
    dx, dw = back(g)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = np.einsum("btd,btf->df", np.asarray(x, np.float64), np.asarray(g, np.float64))
    assert np.linalg.norm(dw - exact) < 1e-6 * np.linalg.norm(exact)
    expected = np.einsum("btf,df->btd", np.asarray(g, np.float64), np.asarray(w, np.float64))
    assert np.linalg.norm(np.asarray(dx, np.float64) - expected) < 0.01 * np.linalg.norm(expected)
