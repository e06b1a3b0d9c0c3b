"""Which tiles of a cache new tokens see, against every pair of a token and a slot."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.kernels import rows

SLOTS = 48


@pytest.mark.parametrize("window", [None, 1, 2, 7, 8, 9, 17])
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("tokens", [1, 3, 11])
def test_ranges_are_the_tiles_that_are_seen(window, size, tokens):
    """At every start: no tile with a visible slot is left out, none without one is walked over,
    and in tiles without a mask every token sees every slot."""
    starts = np.arange(SLOTS - tokens + 1)
    positions = starts[:, None] + np.arange(tokens)
    ranges = np.asarray(rows.ranges(jnp.asarray(positions), window, size))
    distance = positions[:, :, None] - np.arange(SLOTS)
    visible = (distance >= 0) & (distance < (window or SLOTS))
    tiles = visible.reshape(len(starts), tokens, SLOTS // size, size)
    some = tiles.any(axis=(1, 3))
    every = tiles.all(axis=(1, 3))
    for (begin, full_begin, full_end, end), some_row, every_row in zip(ranges, some, every):
        assert 0 <= begin <= full_begin <= full_end <= end <= SLOTS // size
        np.testing.assert_array_equal(np.flatnonzero(some_row), np.arange(begin, end))
        assert every_row[full_begin:full_end].all()
        # As many tiles as possible go without a mask.
        assert every_row.sum() == full_end - full_begin


def test_sequences_have_ranges_of_their_own():
    positions = jnp.array([[9], [30]])
    both = rows.ranges(positions, 5, 8)
    for row in range(2):
        np.testing.assert_array_equal(both[row], rows.ranges(positions[row : row + 1], 5, 8)[0])


def test_packed_rows_are_tokens_by_heads_of_a_group():
    x = jnp.arange(2 * 3 * 4 * 1).reshape(2, 3, 4, 1).astype(jnp.float32)  # N = 4 heads, K = 2
    packed = rows.packed(x, 2, 8)
    for token, head in itertools.product(range(3), range(4)):
        row = 2 * token + head % 2
        np.testing.assert_array_equal(packed[:, head // 2, row], x[:, token, head])
    assert not packed[:, :, 6:].any()
    np.testing.assert_array_equal(rows.unpacked(packed, 3, 4), x)
    positions = rows.row_positions(jnp.array([[5, 6, 7], [0, 1, 2]]), 2, 8)
    np.testing.assert_array_equal(positions[0], [5, 5, 6, 6, 7, 7, 7, 7])
