"""The mesh: five axes that multiply to the devices in use, and the message when they do not."""

import re

import jax
import pytest

from qkvjax.errors import UserError
from qkvjax.parallel import rules
from qkvjax.parallel.mesh import AXES, idle_devices, make_mesh
from qkvjax.training.run import check_mesh


@pytest.mark.parametrize("sizes", [{}, {"replica": 1, "fsdp": 1}, {"fsdp": -1}])
def test_one_device_has_all_axes(sizes):
    mesh = make_mesh(sizes, jax.devices()[:1])
    assert mesh.axis_names == AXES and dict(mesh.shape) == dict.fromkeys(AXES, 1)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"replica": 3, "fsdp": -1}, "multiple of 3 devices, jax has 8"),
        ({"replica": 4, "fsdp": 4}, "needs a multiple of 16 devices, jax has 8.*fsdp"),
        ({"replica": -1, "fsdp": -1}, "at most one may be -1"),
        ({"replica": 0}, "sizes must be at least 1"),
        ({"fsdp": -2}, "sizes must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(sizes, jax.devices()[:1] * 8)


@pytest.mark.parametrize(
    ("sizes", "count", "message"),
    [
        ({}, 8, r"^1 of 8 devices is used: .*mesh\.fsdp=-1.*qkvjax study --jobs=8"),
        ({"fsdp": 2, "tensor": 2}, 8, "^4 of 8 devices are used"),
        ({"fsdp": 8}, 8, None),
        ({"fsdp": -1}, 8, None),
        ({"replica": -1, "tensor": 2}, 8, None),
        ({}, 1, None),
        ({"fsdp": 0}, 8, None),  # make_mesh refuses it
    ],
)
def test_idle_devices_are_named_with_their_use(sizes, count, message):
    hint = idle_devices(sizes, count)
    assert hint is None if message is None else re.search(message, hint)


TWO = dict.fromkeys(AXES, 2)


def test_rules_name_axes_of_the_mesh():
    for axes in rules.RULES.values():
        assert set(axes) <= set(AXES)
    assert rules.spec("batch", None, "heads", sizes=TWO) == jax.P(
        ("replica", "fsdp", "expert"), None, "tensor"
    )
    one = TWO | {"replica": 1, "tensor": 1, "expert": 1}  # axes of size 1 are left out
    assert rules.spec("batch", "length", "heads", sizes=one) == jax.P("fsdp", "context", None)
    assert not rules.has_mesh()
    with pytest.raises(ValueError, match="collide.*tensor"):
        rules.spec("heads", "mlp", sizes=TWO)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        (("projections", "q", "weight"), (3, 8, 16), (None, "fsdp", "tensor")),
        (("output", "weight"), (3, 16, 8), (None, "tensor", "fsdp")),
        (("mlp", "down", "weight"), (16, 8), ("tensor", "fsdp")),
        (("mlp", "up", "weight"), (8, 15), ("fsdp", None)),  # "tensor" does not divide 15
        (("mlp", "up", "weight"), (7, 15), (None, None)),
        (("embedding",), (300, 8), ("tensor", "fsdp")),
        (("head", "weight"), (8, 301), ("fsdp", None)),
        (("mlp", "experts", "up", "weight"), (3, 4, 8, 16), (None, "expert", "fsdp", "tensor")),
        (("positions",), (9, 8), (None, "fsdp")),
        (("positions",), (6, 8), (None, "fsdp")),  # the larger of two
        (("positions",), (10, 8), ("fsdp", None)),
    ],
)
def test_matrices_are_sharded_as_the_rules_say(path, shape, spec):
    assert rules.matrix_spec(path, shape, TWO) == jax.P(*spec)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"tensor": 8}, "the 4 query heads does not divide over 8 devices.*model.num_heads"),
        ({"context": 3}, "a sequence of 16 tokens .* 3 devices .mesh.context.*data.seq_len"),
        ({"replica": 3}, "a micro-batch of 4 sequences .* 3 devices .mesh.replica x mesh.fsdp"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(tiny, mesh, message):
    """Before anything is compiled."""
    mesh = jax.sharding.AbstractMesh(tuple((TWO | dict.fromkeys(AXES, 1) | mesh).values()), AXES)
    with pytest.raises(UserError, match=message):
        check_mesh(mesh, tiny(num_heads=4), 16, 4)


def test_a_mesh_is_in_force():
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        assert rules.has_mesh()


def test_a_mesh_of_one_changes_nothing(model):
    """Notebooks have no mesh, training has one of size 1; both compute the same numbers."""
    m = model(sharing="q-k=v", position="learned", num_layers=1)
    ids = jax.numpy.arange(18).reshape(2, 9)

    def run(m, ids):
        return jax.jit(lambda m, ids: m(ids))(m, ids)

    without_mesh = run(m, ids)
    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        m, ids = jax.device_put((m, ids), rules.sharding(mesh))
        with_mesh = run(m, ids)
    assert (without_mesh == jax.numpy.asarray(jax.device_get(with_mesh))).all()


def test_a_size_that_is_no_product_of_sides_of_a_torus(monkeypatch):
    """Such as 32 of the 4 x 4 x 4 chips of a v5p: a side is split between axes."""

    def refuse(*args, **options):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 3 of size 32")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    mesh = make_mesh({"tensor": -1}, jax.devices()[:1])
    assert mesh.shape == {"replica": 1, "fsdp": 1, "context": 1, "tensor": 1, "expert": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
