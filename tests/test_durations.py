"""Durations in steps, epochs, tokens and parts of a run."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qkvjax.durations import to_steps
from qkvjax.errors import UserError

COMMON = {"tokens_per_step": 4096, "steps_per_epoch": 50}


def steps(value, **options):
    return to_steps(value, "train.steps", **(COMMON | options))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (1, 1),
        (300, 300),
        ("300", 300),
        ("300 steps", 300),
        ("1 step", 1),
        ("1k", 1000),
        ("1_000", 1000),
        ("2ep", 100),
        ("2 epochs", 100),
        ("1 epoch", 50),
        ("0.5ep", 25),
        ("10M tokens", 2441),
        ("4096 tokens", 1),
        ("1 token", 1),
        ("1b tokens", 244_141),
        (" 10m TOKENS ", 2441),
        ("0 tokens", 0),
        (2.5, 2),
        ("0.001ep", 1),
    ],
)
def test_durations(value, expected):
    assert steps(value) == expected


def test_parts_of_the_whole():
    assert steps("5%", total=300) == 15
    assert steps("12.5 %", total=360) == 45
    assert steps("0.1%", total=300) == 1 and steps("0%", total=300) == 0
    with pytest.raises(UserError, match="a percentage of train.steps cannot define train.steps"):
        steps("5%")


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        "",
        "ten",
        "-5",
        -5,
        "1e3",
        "2 years",
        "1.2.3",
        "%",
        "ep",
        ".",
        "5 %%",
        [3],
        "nan",
        "inf",
        "٣",
    ],
)
def test_nonsense_durations(value):
    with pytest.raises(UserError, match="train.steps=.*is not a duration: write steps"):
        steps(value, total=100)


@given(st.text() | st.from_regex(r"[0-9.]{1,400} ?[kmb]?(ep|tokens|steps|%)?", fullmatch=True))
@example("9" * 400)
@example("9" * 30 + "b ep")
@example("0." + "0" * 400 + "1")
def test_any_text_is_steps_or_a_user_error(text):
    for total in (None, 1000):
        try:
            found = steps(text, total=total)
        except UserError as error:
            assert str(error).startswith("train.steps=")
        else:
            assert isinstance(found, int) and 0 <= found < 2**31
