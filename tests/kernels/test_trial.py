"""What "auto" asks of a kernel before it is preferred."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.kernels import dispatch, reference, trial, triton, triton_decode
from qkvjax.parallel.mesh import make_mesh

whole = functools.partial(triton.attention, interpret=True)
token = functools.partial(triton_decode.decode, interpret=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kernel", "decodes"), [(whole, False), (token, True)])
def test_a_kernel_that_is_right_passes(kernel, decodes, tied):
    assert trial.failure(kernel, decodes, not decodes, 64, "bfloat16", tied) is None


def forgets_segments(q, k, v=None, segment_ids=None):
    return whole(q, k, v)


def forgets_a_gradient(q, k, v=None, segment_ids=None):
    return whole(q, jax.lax.stop_gradient(k), v, segment_ids=segment_ids)


def cannot_be_lowered(q, k, v=None, segment_ids=None):
    raise NotImplementedError("no such primitive\nand a long trace")


@pytest.mark.parametrize(
    ("kernel", "why"),
    [(forgets_segments, "other results"), (forgets_a_gradient, "other results"),
     (cannot_be_lowered, r"does not run here \(no such primitive\)")],
)  # fmt: skip
def test_one_that_is_not_does_not(kernel, why):
    assert re.search(why, trial.failure(kernel, False, True, 64, "bfloat16", True))


def test_auto_passes_over_a_kernel_that_fails(monkeypatch, capsys):
    """In a program that is being traced, on a mesh."""

    class Broken:
        refusal = staticmethod(lambda q, v=None, **others: None)
        attention = staticmethod(forgets_segments)

    monkeypatch.setattr(dispatch, "candidates", lambda *_: ("triton", "xla"))
    monkeypatch.setattr(dispatch, "missing", lambda impl: None)
    monkeypatch.setattr(dispatch, "kernel", lambda *_: Broken)
    dispatch._tell.cache_clear()
    q = jax.random.normal(jax.random.key(0), (2, 40, 2, 64), jnp.bfloat16)
    segments = jnp.array([[0] * 20 + [1] * 20] * 2)
    places = jnp.arange(40)[None]
    mask = reference.visible(places, places, causal=True, q_segments=segments, k_segments=segments)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        found = jax.jit(lambda q: dispatch.attention(q, q, segment_ids=segments))(q)
    expected = reference.attention(q, q, mask=mask)
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=0.02)
    assert "attention: xla; not triton: it gives other results here" in capsys.readouterr().err
