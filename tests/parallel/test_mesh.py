"""The mesh: five axes that multiply to the devices in use, and the message when they do not."""

import jax
import pytest

from qkvjax.errors import UserError
from qkvjax.parallel import rules
from qkvjax.parallel.mesh import AXES, make_mesh


@pytest.mark.parametrize("sizes", [{}, {"replica": 1, "fsdp": 1}, {"fsdp": -1}])
def test_one_device_has_all_axes(sizes):
    mesh = make_mesh(sizes, jax.devices()[:1])
    assert mesh.axis_names == AXES and dict(mesh.shape) == dict.fromkeys(AXES, 1)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"replica": 3, "fsdp": -1}, "multiple of 3 devices and 8 are here"),
        ({"replica": 4, "fsdp": 4}, "needs a multiple of 16 devices and 8 are here.*fsdp"),
        ({"replica": -1, "fsdp": -1}, "at most one is -1"),
        ({"replica": 0}, "sizes are at least 1"),
        ({"fsdp": -2}, "sizes are at least 1"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(sizes, jax.devices()[:1] * 8)


def test_rules_name_axes_of_the_mesh():
    for axes in filter(None, rules.RULES.values()):
        assert set((axes,) if isinstance(axes, str) else axes) <= set(AXES)
    assert rules.spec("batch", None, "embed") == jax.P(("replica", "fsdp"), None, "fsdp")
    assert not rules.has_mesh()
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        assert rules.has_mesh()


def test_a_mesh_of_one_changes_nothing(model):
    """Notebooks have no mesh, training has one of size 1: the same numbers."""
    m = model(sharing="q-k=v", position="learned", num_layers=1)
    ids = jax.numpy.arange(18).reshape(2, 9)
    run = lambda: jax.jit(lambda m, ids: m(ids))(m, ids)  # noqa: E731
    plain = run()
    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        m, ids = jax.device_put((m, ids), rules.sharding(mesh))
        meshed = run()
    assert (plain == jax.numpy.asarray(jax.device_get(meshed))).all()
