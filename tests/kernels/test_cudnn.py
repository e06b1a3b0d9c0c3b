"""What we ask of NVIDIA's library, without it: jax computes the same by other means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.errors import UserError
from qkvjax.kernels import cudnn, reference


@pytest.mark.parametrize(
    ("tied", "causal", "window"), [(True, True, 5), (False, True, None), (True, False, None)]
)
def test_it_is_asked_for_the_references_attention(tied, causal, window, monkeypatch):
    monkeypatch.setattr(cudnn, "BACKEND", "xla")
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(key, (2, 33, n, 64), jnp.bfloat16)
        for key, n in zip(keys, (4, 2) if tied else (4, 2, 2))
    ]
    places = jnp.arange(33)[None]
    mask = reference.visible(places, places, causal=causal, window=window)
    options = {"causal": causal, "window": window, "scale": 0.2}

    def both(function, arrays):
        out, back = jax.vjp(function, *arrays)
        return out, *back(jnp.cos(out))

    found = both(lambda *arrays: cudnn.attention(*arrays, **options), arrays)
    truth = both(
        lambda *arrays: reference.attention(*arrays, mask=mask, scale=0.2),
        [x.astype(jnp.float32) for x in arrays],
    )
    for a, b in zip(found, truth, strict=True):
        a = np.asarray(a, np.float32)
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


def test_what_it_would_leave_out_silently_is_refused():
    x = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    assert cudnn.refusal(x) is None and cudnn.refusal(x, x, window=3) is None
    assert "segments" in cudnn.refusal(x, segment_ids=jnp.zeros((1, 8), int))
    assert "look back" in cudnn.refusal(x, window=3, causal=False)
    assert "second part" in cudnn.refusal(x, q_pe=x)
    assert "up to 128, not 256" in cudnn.refusal(jnp.zeros((1, 8, 2, 256), jnp.bfloat16))
    assert "not float32" in cudnn.refusal(x.astype(jnp.float32))
    with pytest.raises(UserError, match="does not support segments; use impl='auto'"):
        cudnn.attention(x, x, segment_ids=jnp.zeros((1, 8), int))
