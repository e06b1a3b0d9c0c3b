"""What "auto" asks of a kernel before it is preferred."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.kernels import choice, dispatch, reference, trial
from qkvjax.kernels.tpu import splash
from qkvjax.kernels.trial import Problem
from qkvjax.kernels.triton import attention as triton
from qkvjax.kernels.triton import decode as triton_decode
from qkvjax.parallel.mesh import make_mesh
from qkvjax.parallel.target import Target

whole = functools.partial(triton.attention, interpret=True)
token = functools.partial(triton_decode.decode, interpret=True)
tiles = functools.partial(splash.attention, interpret=True)
PACKED = Problem("bfloat16", 64, 64, 2, 40, packed=True)


@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        (whole, {}),
        (whole, {"values_are_keys": False, "window": 20}),
        (whole, {"keys_are_queries": True, "group": 1}),
        (whole, {"keys_are_queries": True, "group": 1, "values_are_keys": False}),
        (whole, {"causal": False, "packed": False, "second": 3}),
        (tiles, {"values_are_keys": False, "group": 4}),
        (token, {"decodes": True, "length": 1}),
        (token, {"decodes": True, "length": 3, "values_are_keys": False, "window": 50}),
        (token, {"decodes": True, "length": 1, "page": 16}),
    ],
)
def test_a_kernel_that_is_right_passes(kernel, changes):
    assert trial.failure(kernel, dataclasses.replace(PACKED, **changes)) is None


def forgets(**names):
    """A kernel that ignores some options."""

    def kernel(q, k, v=None, **options):
        return whole(q, k, v, **options | names)

    return kernel


def forgets_a_gradient(q, k, v=None, **options):
    return whole(q, jax.lax.stop_gradient(k), v, **options)


def wants_other_keys(q, k, v=None, **options):
    return whole(q, k, v, **options) + (q is k)


def cannot_be_lowered(q, k, v=None, **options):
    raise NotImplementedError("no such primitive\nand a long trace")


@pytest.mark.parametrize(
    ("kernel", "changes", "why"),
    [
        (forgets(segment_ids=None), {}, "other results"),
        (forgets(window=None), {"window": 30}, "other results"),
        (forgets(causal=True), {"causal": False}, "other results"),
        (forgets(q_pe=None, k_pe=None), {"second": 8}, "other results"),
        (forgets_a_gradient, {}, "other results"),
        (wants_other_keys, {"keys_are_queries": True, "group": 1}, "other results"),
        (cannot_be_lowered, {}, r"does not run here \(no such primitive\)"),
    ],
)
def test_one_that_is_wrong_in_what_is_asked_of_it_does_not(kernel, changes, why):
    assert re.search(why, trial.failure(kernel, dataclasses.replace(PACKED, **changes)))


def test_a_long_sequence_is_tried_at_a_shorter_one_whose_last_tile_is_filled_as_far():
    assert trial.trial_length(1000, 900) == (1000, 900)
    assert trial.trial_length(8192, None) == (1024, None)
    assert trial.trial_length(8192 + 77, 4096) == (1101, 734)


def test_what_cannot_be_traced_is_not_taken_for_a_device_that_is_not_here():
    assert trial.refuses(whole, PACKED) is None
    assert "no such primitive" in trial.refuses(cannot_be_lowered, PACKED)


@pytest.mark.parametrize("queries_are_keys", [False, True])
def test_auto_passes_over_a_kernel_that_fails(monkeypatch, capsys, queries_are_keys):
    """In a program that is being traced, on a mesh: the very call is tried."""
    tried = []

    class Broken:
        refusal = staticmethod(lambda q, v=None, **others: None)

        @staticmethod
        def attention(q, k, v=None, **options):
            tried.append(q is k)
            return forgets(segment_ids=None)(q, k, v, **options)

    here = Target("gpu", "NVIDIA H200", "9.0", here=True)
    monkeypatch.setattr(choice, "target", lambda: here)
    monkeypatch.setattr(choice, "candidates", lambda *_: ("triton", "xla"))
    monkeypatch.setattr(choice, "kernel", lambda *_: Broken)
    q = jax.random.normal(jax.random.key(0), (2, 40, 2, 64), jnp.bfloat16)
    segments = jnp.array([[0] * 20 + [1] * 20] * 2)
    places = jnp.arange(40)[None]
    mask = reference.visible(places, places, causal=True, q_segments=segments, k_segments=segments)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        k = None if queries_are_keys else q
        found = jax.jit(lambda q: dispatch.attention(q, k, segment_ids=segments))(q)
    expected = reference.attention(q, q, mask=mask)
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=0.02)
    assert set(tried) == {queries_are_keys}
    said = capsys.readouterr().err
    assert "attention: xla, whose memory" in said
    assert "not triton: it gives other results here" in said
