"""Grids from combinators."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkvjax import sweep
from qkvjax.attention.spec import SHARINGS
from qkvjax.errors import UserError
from qkvjax.sweep import axis, chain, product, zipped

lengths = st.lists(st.integers(0, 4), min_size=1, max_size=4)


def axes(counts):
    return [axis(f"model.f{i}", range(count)) for i, count in enumerate(counts)]


@given(lengths)
def test_product_has_every_combination_once(counts):
    points = product(*axes(counts))
    assert len(points) == math.prod(counts)
    assert len({tuple(sorted(point.items())) for point in points}) == len(points)
    assert all(len(point) == len(counts) for point in points)


@given(lengths)
def test_chain_adds(counts):
    points = chain(*axes(counts))
    assert len(points) == sum(counts) and all(len(point) == 1 for point in points)


@given(st.integers(0, 5), st.integers(1, 4))
def test_zipped_pairs(length, width):
    points = zipped(*axes([length] * width))
    assert points == tuple({f"model.f{i}": n for i in range(width)} for n in range(length))


@given(lengths.filter(lambda counts: len(set(counts)) > 1))
def test_zipped_needs_equal_lengths(counts):
    with pytest.raises(UserError, match="make them equal"):
        zipped(*axes(counts))


def test_the_last_axis_varies_fastest():
    points = product(axis("a", (1, 2)), axis("b", "xy"))
    assert [tuple(p.values()) for p in points] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]


@pytest.mark.parametrize("combine", [product, zipped])
def test_a_field_on_two_axes_clashes(combine):
    with pytest.raises(UserError, match="model.sharing stands on two axes"):
        combine(axis("model.sharing", SHARINGS), axis("model.sharing", SHARINGS))


def test_combinators_nest():
    grid = chain(
        axis("model.sharing", ("q-k-v",)),
        product(axis("model.sharing", ("q-k=v",)), zipped(axis("a", (1, 2)), axis("b", (3, 4)))),
    )
    assert grid[0] == {"model.sharing": "q-k-v"}
    assert grid[1:] == (
        {"model.sharing": "q-k=v", "a": 1, "b": 3},
        {"model.sharing": "q-k=v", "a": 2, "b": 4},
    )


@pytest.mark.parametrize(
    ("point", "label"),
    [
        ({}, "base"),
        ({"model.sharing": "q-k-v"}, "QKV"),
        ({"model.sharing": "q-k=v", "model.num_kv_heads": 1}, "Q-K=V num_kv_heads=1"),
        ({"model.sharing": "q-k=v", "label": "ours"}, "ours"),
    ],
)
def test_labels(point, label):
    assert sweep.label(point) == label


@given(st.text(max_size=40))
def test_a_slug_is_one_harmless_folder(text):
    slug = sweep.slug(text)
    assert slug and not set(slug) - set("abcdefghijklmnopqrstuvwxyz0123456789._=-")
    assert slug.strip(".") == slug and slug not in (".", "..")


def test_the_identity_hash_ignores_order():
    one, two = {"a": 1, "b": [2]}, {"b": [2], "a": 1}
    assert sweep.identity_hash(one) == sweep.identity_hash(two) != sweep.identity_hash({"a": 1})
    assert len(sweep.identity_hash(one)) == 12
