"""Grids from combinators."""

import math

import ml_collections
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qkvjax import config as configs
from qkvjax import sweep
from qkvjax.attention.spec import SHARINGS
from qkvjax.errors import UserError
from qkvjax.fields import Model
from qkvjax.models.spec import model_spec
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
    with pytest.raises(UserError, match="make them equally long"):
        zipped(*axes(counts))


def test_the_last_axis_varies_fastest():
    points = product(axis("a", (1, 2)), axis("b", "xy"))
    assert [tuple(p.values()) for p in points] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]


@pytest.mark.parametrize("combine", [product, zipped])
def test_a_field_on_two_axes_clashes(combine):
    with pytest.raises(UserError, match="model.sharing is on two axes"):
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


HEADS = st.sampled_from((2, 4, 6, 8, 12, 16))
BASE = configs.plain(Model(num_layers=2, num_heads=4))


def spec_of(point, **fields):
    """The spec of a point of the quickstart's model."""
    overrides = {name.removeprefix("model."): v for name, v in point.items() if name != "label"}
    return model_spec(Model(**(BASE | fields | overrides)), 257, 128)


def test_the_control_of_a_tie_has_half_the_heads():
    tied = axis("model.sharing", ("q-k=v",))
    assert sweep.equal_cache(tied, num_heads=4) == ({"label": "GQA-2", "model.num_kv_heads": 2},)
    both = axis("model.sharing", ("q-k=v", "Q=K=V"))
    assert sweep.equal_cache(both, num_heads=2) == ({"label": "MQA", "model.num_kv_heads": 1},)


@given(HEADS, st.sampled_from((1, 2, 4)), st.sampled_from(("raw", "rotated")))
def test_a_control_has_the_same_cache(num_heads, group, values):
    assume(num_heads % (2 * group) == 0)
    heads = num_heads // group
    point = {
        "model.sharing": "q-k=v",
        "model.num_kv_heads": heads,
        "model.rotary_values": values,
        "model.mlp_ratio": 2.0,
    }
    (control,) = sweep.equal_cache((point,), num_heads=num_heads)
    shape = {"num_heads": num_heads, "d_model": 32 * num_heads}
    tied, untied = spec_of(point, **shape), spec_of(control, **shape)
    assert untied.cache_bytes_per_token() == tied.cache_bytes_per_token()
    assert not untied.layers[0].shares_kv and control["model.mlp_ratio"] == 2.0
    name = "MQA" if heads == 2 else f"GQA-{heads // 2}"
    assert control["label"] == f"{name} mlp_ratio=2.0"


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({}, "K and V of the point 'base' are not tied"),
        ({"model.sharing": "q=k-v"}, "K and V of the point 'Q=K-V' are not tied"),
        ({"model.sharing": "q=v-k"}, "not tied.*'q-k=v' or 'q=k=v'"),
        (
            {"model.sharing": "q-k=v", "model.num_kv_heads": 1},
            "'Q-K=V num_kv_heads=1' has 1 key-value heads of 4 heads, which cannot be halved",
        ),
        ({"model.sharing": "q-k=v", "model.num_heads": 3}, "has 3 key-value heads of 3 heads"),
    ],
)
def test_points_without_a_control(point, message):
    with pytest.raises(UserError, match=message):
        sweep.equal_cache((point,), num_heads=4)


QUARTER = {"label": "Q-K=V GQA-2", "model.sharing": "q-k=v", "model.num_kv_heads": 2}
SMALLER = (
    {"model.sharing": "q-k-v"},
    {"model.sharing": "q-k=v"},
    {"label": "GQA-2", "model.num_kv_heads": 2},
    {"label": "MQA", "model.num_kv_heads": 1},
    QUARTER,
)


@pytest.mark.parametrize("match", sweep.MATCHES)
def test_the_feed_forwards_of_the_quickstart(match):
    """Runs with exactly these values are there."""
    wider = sweep.equal_params(SMALLER, BASE, match, seq_len=128)
    assert wider[0] == SMALLER[0]
    assert [(sweep.label(point), point["model.mlp_ratio"]) for point in wider[1:]] == [
        ("Q-K=V wider", 3.0625),
        ("GQA-2 wider", 3.0625),
        ("MQA wider", 3.25),
        ("Q-K=V GQA-2 wider", 3.25),
    ]
    assert [spec_of(point).d_ff for point in wider] == [352, 392, 392, 416, 416]
    for point in wider:
        assert abs(spec_of(point).num_params / 435_968 - 1) < 0.01


@given(
    st.sampled_from((64, 96, 128, 160, 256)),
    st.sampled_from(SHARINGS),
    st.sampled_from(("swiglu", "gelu", "swiglu(up=down)", "swiglu(experts=4,top=2)")),
    st.sampled_from(sweep.MATCHES),
)
def test_no_other_width_comes_nearer(d_model, sharing, mlp, match):
    def cost(point):
        spec = spec_of(point, d_model=d_model, mlp=mlp)
        return spec.num_params if match == "parameters" else spec.forward_macs(32)

    untied, point = {"model.sharing": "q-k-v"}, {"model.sharing": sharing}
    model = BASE | {"d_model": d_model, "mlp": mlp}
    (wider,) = sweep.equal_params((point,), model, match, baseline=untied, seq_len=32)
    d_ff = spec_of(wider, d_model=d_model, mlp=mlp).d_ff
    left = abs(cost(wider) - cost(untied))
    for other in (d_ff - 8, d_ff + 8):
        assert left <= abs(cost(point | {"model.mlp_ratio": other / d_model}) - cost(untied))
    assert ("label" in wider) == (sharing != "q-k-v")


def test_a_larger_point_gets_a_narrower_feed_forward():
    wide = {"model.sharing": "q-k-v", "model.mlp_ratio": 4.0}
    (point,) = sweep.equal_params((wide,), BASE, baseline={})
    assert point == wide | {"model.mlp_ratio": 2.75, "label": "QKV mlp_ratio=4.0 narrower"}


def test_what_equal_params_refuses():
    with pytest.raises(UserError, match="match='macs' is not one of parameters, flops"):
        sweep.equal_params(SMALLER, BASE, "macs")
    with pytest.raises(UserError, match="set seq_len=config.data.seq_len"):
        sweep.equal_params(SMALLER, BASE, "flops")
    with pytest.raises(UserError, match="'d_model=512' is larger than the baseline"):
        sweep.equal_params(({}, {"model.d_model": 512}), BASE)
    assert sweep.equal_params((), BASE) == ()


def test_tuned_is_a_group_of_a_config():
    group = sweep.tuned("optimizer.learning_rate", (value for value in (1e-3, 2e-3)), seeds=3)
    assert group == {"field": "optimizer.learning_rate", "values": (1e-3, 2e-3), "seeds": 3}
    assert ml_collections.ConfigDict({"tuned": group}).tuned.to_dict() == group
    assert sweep.tuned("model.dropout", [0.0], seeds=range(2))["seeds"] == (0, 1)


def test_a_value_by_setting():
    point = {"label": "GQA half", "model.num_kv_heads": sweep.by_setting({"a": 1, "b": 2})}
    assert sweep.in_setting(point, "b") == {"label": "GQA half", "model.num_kv_heads": 2}
    assert sweep.overrides_of(point | {"model.window": 4}) == {
        "overrides": {"model.window": 4},
        "by_setting": {"model.num_kv_heads": {"a": 1, "b": 2}},
    }
    assert sweep.overrides_of({"label": "x", "a": 1}) == {"overrides": {"a": 1}}
    message = "model.num_kv_heads has no value for the setting 'c': it has one for a, b"
    with pytest.raises(UserError, match=message):
        sweep.in_setting(point, "c")
