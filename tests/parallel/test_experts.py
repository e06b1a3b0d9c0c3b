"""Experts on several devices: tokens are exchanged, and none is dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from qkvjax.costs.program import Program
from qkvjax.fields import Model
from qkvjax.models.moe import Experts
from qkvjax.models.spec import model_spec
from qkvjax.parallel import experts
from qkvjax.parallel.mesh import make_mesh
from qkvjax.training.step import state_shardings

B, T, D = 8, 128, 16
MESHES = {
    "experts": {"expert": 8},
    "experts and columns": {"expert": 4, "tensor": 2},
    "experts and sequences": {"fsdp": 2, "expert": 4},
}


def layer():
    """Eight experts, two for each token, with random parameters in float64."""
    model = Model(d_model=D, num_heads=2, num_layers=1, mlp="swiglu(experts=8,top=2)")
    spec = model_spec(model, 61, T)
    abstract = jax.eval_shape(lambda: Experts(spec, key=jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), abstract)


def loss(module, x):
    y, router = module(x)
    return jnp.sum(y**2) + router["balance"]


def computed(module, x):
    """Output and gradients, as lists, and the compiled program that computes both."""

    def both(module, x):
        return module(x)[0], jax.grad(loss, argnums=(0, 1))(module, x)

    program = jax.jit(both).lower(module, x).compile()
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(program(module, x))], program


def sent(program):
    """Bytes by kind of collective."""
    kinds = Program(program.as_text()).collectives()
    return {kind: totals["bytes"] for kind, totals in kinds.items()}


def placed(module, x, mesh):
    """A layer and its tokens, sharded over a mesh as in training."""
    axes = tuple(axis for axis in ("fsdp", "expert") if mesh.shape[axis] > 1)
    over_rows = jax.NamedSharding(mesh, jax.P(axes))
    module = jax.device_put({"mlp": module}, state_shardings({"mlp": module}, mesh))["mlp"]
    return module, jax.device_put(x, over_rows)


def busiest_pair(module, x, mesh):
    """[the most tokens that one device has for one other, the capacity at a slack of 1.6]."""
    ways = mesh.shape["expert"]
    devices = ways * mesh.shape["fsdp"]
    logits = (x @ np.asarray(module.router.weight[...])).reshape(devices, -1, 8)
    chosen = np.argsort(-logits, axis=-1)[..., :2] // (8 // ways)
    visits = (chosen[..., None] == np.arange(ways)).any(-2).sum(1)
    experts.SLACK = 1.6
    return [int(visits.max()), experts.capacity(logits.shape[1], ways, 8, 2)]


def main():
    module, x = layer(), np.random.default_rng(1).normal(size=(B, T, D))
    # Every token goes to one expert, and so to one device: more tokens than the capacity.
    crowded = jax.tree.map(lambda leaf: leaf, module)
    crowded.router.weight[...] = 0.1 * module.router.weight[...].at[0, 3].set(60.0)
    positive_x = x.copy()
    positive_x[..., 0] = 1 + abs(x[..., 0])
    cases = {"random": (module, x), "one expert": (crowded, positive_x)}
    results = {name: {"alone": computed(*case)[0]} for name, case in cases.items()}
    results |= {"sent": {}, "gathering": {}}
    default_slack = experts.SLACK
    for label, sizes in MESHES.items():
        mesh = make_mesh(sizes)
        with jax.set_mesh(mesh):
            programs = {}
            for name, case in cases.items():
                # At the first slack tokens are always gathered, at the other exchanged if they fit.
                for slack in (1e9, 1.6):
                    experts.SLACK = slack
                    values, programs[slack] = computed(*placed(*case, mesh))
                    results[name][f"{label}, {slack}"] = values
                results[name]["busiest pair of " + label] = busiest_pair(*case, mesh)
            experts.SLACK = default_slack
            results["sent"][label] = sent(computed(*placed(*case, mesh))[1])
            results["gathering"][label] = sent(programs[1e9])
    processes.print_result(results)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    program = f"import {__name__} as t; t.main()"
    return processes.run_program(tmp_path_factory.mktemp("experts"), program, JAX_ENABLE_X64="1")


@pytest.mark.parametrize("routing", ["random", "one expert"])
@pytest.mark.parametrize("mesh", MESHES)
def test_no_token_is_dropped(results, routing, mesh):
    """Output and gradients are those of one device, whether tokens fit or the layer gathers."""
    tokens, capacity = results[routing]["busiest pair of " + mesh]
    assert (tokens <= capacity) == (routing == "random")
    for slack in (1e9, 1.6):
        on_mesh = results[routing][f"{mesh}, {slack}"]
        for expected, values in zip(results[routing]["alone"], on_mesh, strict=True):
            scale = np.abs(expected).max()
            assert scale > 0
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("mesh", MESHES)
def test_exchanging_sends_less_than_gathering(results, mesh):
    """Counts the bytes that a device receives. A reduce-scatter counts with what a device sends:
    the results of all devices."""
    exchanged = results["sent"][mesh]
    gathered = results["gathering"][mesh]
    assert "all-to-all" not in gathered and exchanged["all-to-all"] > 0
    received = gathered["all-gather"] - exchanged.get("all-gather", 0)
    assert exchanged["all-to-all"] < received + gathered["reduce-scatter"] * MESHES[mesh]["expert"]
    assert exchanged["all-reduce"] < 1.1 * gathered["all-reduce"]


def test_capacity():
    """A quarter more than even routing needs, and never more than there are tokens."""
    assert experts.capacity(1000, 8, 8, 1) == 157
    assert experts.capacity(1000, 2, 8, 2) == 983
    assert experts.capacity(100, 4, 8, 2) == np.ceil(125 * (1 - 15 / 28))
