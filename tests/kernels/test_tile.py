"""The mathematics of a tile against the whole matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qkvjax.kernels import tile

SIZES = st.sampled_from([8, 16, 32])


@settings(max_examples=25)
@given(
    st.booleans(),
    st.none() | st.integers(1, 70),
    st.integers(1, 64),
    SIZES,
    SIZES,
    st.none() | st.integers(0, 2**31),
    st.booleans(),
)
# Tiles whose farthest pair is exactly at the window's edge, and whose nearest pair is just inside.
@example(False, 15, 64, 16, 8, None, False)
@example(True, 10, 64, 8, 8, None, False)
def test_spans_leave_out_no_pair_and_mask_every_edge(
    causal, window, length, queries, keys, seed, by_keys
):
    places = 64
    segments = None
    if seed is not None:  # in any order, as a mask may have them
        segments = np.random.default_rng(seed).integers(0, 3, (2, 8)).repeat(8, axis=1)
    limits = {"causal": causal, "window": window, "length": length}
    rows, columns = jnp.arange(places)[None, :, None], jnp.arange(places)[None, None]
    of = {}
    if segments is not None:
        of = {"row_segments": segments[:, :, None], "column_segments": segments[:, None]}
    every = tile.visible(rows, columns, **limits, **of)
    every = np.broadcast_to(every, (1 if segments is None else 2, places, places))
    seen = every & (np.arange(places)[:, None] < length)
    cut = lambda x: x.reshape(len(x), places // queries, queries, places // keys, keys)  # noqa: E731
    some, every = cut(seen).any((2, 4)), cut(every).all((2, 4))
    spans = np.asarray(
        tile.ranges(queries, keys, places, **limits, segments=segments, by_keys=by_keys)
    )
    options = tile.Options(causal, window, 1.0, length, None, None, None)
    edges = options.masked_ends(places, segments, by_keys)
    if by_keys:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    assert spans.shape == (*some.shape[:2], 4)
    for b, i in np.ndindex(some.shape[:2]):
        begin, whole, rest, end = spans[b, i]
        assert 0 <= begin <= whole <= rest <= end <= some.shape[2]
        assert every[b, i, whole:rest].all()
        walked = np.zeros(some.shape[2], bool)
        for first, last, there in (
            (begin, whole, edges[0]),
            (whole, rest, True),
            (rest, end, edges[1]),
        ):
            walked[first:last] |= there
        assert walked[some[b, i]].all(), "a tile that is seen was left out"


def test_a_tile_of_two_segments_is_masked():
    """Without a causal mask: the second tile of keys begins in the queries' segment and ends in
    another, so that its pairs are visible in part; the tiles of that segment alone are skipped."""
    segments = jnp.array([[0] * 12 + [1] * 20])  # tiles of 8: [0], [0, 1], [1], [1]
    rules = {"causal": False, "window": None, "length": 32}
    ranges = np.asarray(tile.ranges(8, 8, 32, **rules, segments=segments))[0]
    # Tile 0 sees itself whole, and tile 1 in part.
    np.testing.assert_array_equal(ranges[0], [0, 0, 1, 2])
    # Tile 1 has queries of both segments: it sees every tile, all of them in part.
    begin, full_begin, full_end, end = ranges[1]
    assert (begin, end) == (0, 4) and full_begin == full_end
    # Tiles 2 and 3 see tile 1 in part, and each other whole.
    np.testing.assert_array_equal(ranges[2:], [[1, 2, 4, 4]] * 2)
    by_keys = np.asarray(tile.ranges(8, 8, 32, **rules, segments=segments, by_keys=True))[0]
    np.testing.assert_array_equal(by_keys[[0, 2, 3]], ranges[[0, 2, 3]])


@pytest.mark.parametrize("seen", [False, True])
def test_softmax_by_tiles_is_softmax(seen):
    """Scores large enough that a step forgotten would show, one row that sees nothing at first."""
    scores, values = (jax.random.normal(jax.random.key(i), (4, 24)) for i in range(2))
    scores, values, scale = 30 * scores, values.T, 0.7
    mask = jnp.ones((4, 24), bool).at[1, :8].set(not seen)
    state = tile.empty_state(4, [4])
    for at in range(0, 24, 8):
        cut = slice(at, at + 8)
        state = tile.accumulate(
            state, scores[:, cut], mask[:, cut] if seen else None, [values[cut]], scale
        )
    top, total, [mixed] = state
    hidden = jnp.where(mask, scale * scores, -jnp.inf)
    expected = jax.nn.softmax(hidden, axis=1) @ values
    np.testing.assert_allclose(mixed / total[:, None], expected, atol=2e-6)
    normaliser = (top + jnp.log2(total)) / tile.LOG2E
    np.testing.assert_allclose(normaliser, jax.nn.logsumexp(hidden, axis=1), rtol=1e-6)
