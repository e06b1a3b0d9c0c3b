"""Which variants there are, and the message for each that there is not."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkvjax.attention.spec import (
    SHARINGS,
    AttentionSpec,
    canonical_sharing,
    itemsize,
    parse_sharing,
    sharing_name,
)
from qkvjax.errors import UserError

BASE = {"d_model": 64, "num_heads": 8}


def test_five_sharings_are_all_the_partitions():
    partitions = {frozenset(map(frozenset, parse_sharing(sharing))) for sharing in SHARINGS}
    assert len(SHARINGS) == len(partitions) == 5  # the Bell number of three roles
    for partition in partitions:
        assert sorted(role for block in partition for role in block) == ["k", "q", "v"]


def test_names_in_reports():
    assert list(map(sharing_name, SHARINGS)) == ["QKV", "Q-K=V", "Q=K-V", "Q=V-K", "Q=K=V"]


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_sharing_by_its_name_in_reports(sharing):
    for written in (sharing, sharing_name(sharing), sharing_name(sharing).lower(), sharing.upper()):
        assert canonical_sharing(written) == sharing and sharing_name(written) == sharing_name(
            sharing
        )
        assert AttentionSpec(**BASE, sharing=written).sharing == sharing
    assert canonical_sharing("k=v-q") == "k=v-q" and canonical_sharing(None) is None


@pytest.mark.parametrize(
    ("written", "usual"),
    [
        ("k=v-q", "q-k=v"),
        ("q-v=k", "q-k=v"),
        ("v-k-q", "q-k-v"),
        ("k=q-v", "q=k-v"),
        ("k-v=q", "q=v-k"),
        ("v=k=q", "q=k=v"),
    ],
)
def test_unusual_order_names_the_usual_one(written, usual):
    with pytest.raises(UserError, match=f"'{re.escape(usual)}'"):
        parse_sharing(written)


@pytest.mark.parametrize("text", ["", "q", "q-k", "q=k", "q-k-k", "q=k=v=q", "qkv", "Q-K=V", "q,k"])
def test_no_partition(text):
    with pytest.raises(UserError, match="not a partition.*q-k=v"):
        parse_sharing(text)


@given(st.text() | st.text(alphabet="qkv=-", max_size=7))
def test_any_text_is_one_of_the_five_or_a_user_error(text):
    try:
        blocks = parse_sharing(text)
    except UserError as error:
        assert text not in SHARINGS and repr(text) in str(error)
    else:
        assert text in SHARINGS and "-".join("=".join(block) for block in blocks) == text


@pytest.mark.parametrize(
    ("fields", "named", "remedy"),
    [
        ({"sharing": "q=k"}, "sharing", "q=k-v"),
        ({"sharing": "k=v-q"}, "sharing", "q-k=v"),
        ({"sharing": "q=k-v", "num_kv_heads": 2}, "num_kv_heads=2", "num_heads=8"),
        ({"sharing": "q=v-k", "num_kv_heads": 4}, "num_kv_heads=4", "'q-k=v'"),
        ({"sharing": "q=k=v", "num_kv_heads": 1}, "num_kv_heads=1", "'q-k=v'"),
        ({"num_kv_heads": 3}, "num_kv_heads=3", "divisor of 8"),
        ({"num_kv_heads": 16}, "num_kv_heads=16", "divisor of 8"),
        ({"num_kv_heads": 0}, "num_kv_heads=0", "divisor of 8"),
        ({"num_heads": 7}, "num_heads=7", "head_dim"),
        ({"num_heads": 0}, "num_heads=0", "at least 1"),
        ({"d_model": 0}, "d_model=0", "at least 1"),
        ({"head_dim": 0}, "head_dim=0", "at least 1"),
        ({"window": 0}, "window=0", "unset"),
        ({"position": "alibi"}, "position='alibi'", "rope"),
        ({"position": "rop"}, "position='rop'", "did you mean 'rope'"),
        ({"rotary_values": "twisted"}, "rotary_values='twisted'", "unrotated_output"),
        ({"sharing": "q-k=v", "rotary_values": "rotated"}, "position='none'", "'raw'"),
        (
            {"sharing": "q-k=v", "position": "learned", "rotary_values": "unrotated_output"},
            "position='learned'",
            "'raw'",
        ),
        ({"position": "rope", "rotary_values": "rotated"}, "sharing='q-k-v'", "'raw'"),
        (
            {"sharing": "q=k-v", "position": "rope", "rotary_values": "unrotated_output"},
            "sharing='q=k-v'",
            "'raw'",
        ),
        ({"position": "rope", "head_dim": 7}, "head_dim=7", "even"),
        ({"position": "rope", "rotary_fraction": 0.4}, "rotary_fraction=0.4", "even"),
        ({"position": "rope", "rotary_fraction": 0.0}, "rotary_fraction=0.0", "position='none'"),
        ({"position": "rope", "rotary_fraction": 1.5}, "rotary_fraction=1.5", r"\(0, 1\]"),
        ({"position": "rope", "rotary_base": 1.0}, "rotary_base=1.0", "above 1"),
    ],
)
def test_one_message_names_field_and_remedy(fields, named, remedy):
    with pytest.raises(UserError) as caught:
        AttentionSpec(**(BASE | fields))
    message = str(caught.value)
    assert re.search(re.escape(named), message) and re.search(remedy, message)
    assert "\n" not in message and caught.value.code == 2


@pytest.mark.parametrize("sharing", ["q-k-v", "q=k-v", "q=v-k"])
def test_layout_shared_needs_k_equal_v(sharing):
    spec = AttentionSpec(**BASE, sharing=sharing)
    assert spec.cache_layout == "kv"
    with pytest.raises(UserError, match="'shared'.*'kv'"):
        spec.cache_bytes_per_token("float32", "shared")


def test_unknown_layout_and_dtype_list_what_there_is():
    spec = AttentionSpec(**BASE)
    with pytest.raises(UserError, match="'paged'.*kv, shared"):
        spec.check_layout("paged")
    with pytest.raises(UserError, match="'float8'.*bfloat16"):
        itemsize("float8")


def test_legal_neighbours_of_the_errors():
    """What the messages recommend is accepted."""
    assert AttentionSpec(**BASE, sharing="q=k=v", num_kv_heads=8).num_kv_heads == 8
    assert AttentionSpec(d_model=65, num_heads=8, head_dim=16).head_dim == 16
    assert AttentionSpec(**BASE, position="rope", rotary_fraction=0.5).rotary_dim == 4
    for sharing in ("q-k=v", "q=v-k", "q=k=v"):
        for values in ("raw", "rotated", "unrotated_output"):
            AttentionSpec(**BASE, sharing=sharing, position="rope", rotary_values=values)


@pytest.mark.parametrize(
    ("fields", "one_tile"),
    [
        ({"sharing": "q-k=v"}, True),
        ({"sharing": "q-k=v", "qk_norm": True}, False),
        ({"sharing": "q-k=v", "position": "rope"}, False),
        ({"sharing": "q-k=v", "position": "rope", "rotary_values": "rotated"}, True),
        (
            {
                "sharing": "q=k=v",
                "position": "rope",
                "rotary_values": "unrotated_output",
                "qk_norm": True,
            },
            True,
        ),
        ({"sharing": "q=v-k", "position": "rope", "rotary_values": "rotated"}, False),
        ({"sharing": "q-k-v"}, False),
    ],
)
def test_when_the_key_tile_is_the_value_tile(fields, one_tile):
    assert AttentionSpec(**BASE, **fields).values_are_keys == one_tile


def test_the_implementation_of_a_model_comes_from_its_configuration():
    """No state of the process: two models of one process may use different ones."""
    from qkvjax.fields import Model
    from qkvjax.models.spec import model_spec

    for name in ("auto", "reference"):
        spec = model_spec(Model(), 256, 16, implementation=name)
        assert {layer.implementation for layer in spec.layers} == {name}
