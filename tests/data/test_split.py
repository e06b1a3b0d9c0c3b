from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkvjax.data.sources import Source
from qkvjax.data.split import divide
from qkvjax.errors import UserError


def divided(documents, whole=False):
    return divide(Source("made up", (Path(),), lambda: documents), whole)


def sides(documents, whole=False):
    split = divided(documents, whole)
    return list(split.documents("train")), list(split.documents("validation"))


texts = st.lists(st.text(min_size=1, max_size=9).map(lambda text: text.encode("utf-8", "replace")))


@given(texts.filter(lambda documents: len(documents) >= 20))
def test_a_tenth_by_content(documents):
    train, validation = sides(documents)
    assert sorted(train + validation) == sorted(documents)
    assert not set(train) & set(validation)
    assert len(set(validation)) == max(1, round(len(set(documents)) / 10))


def test_order_and_neighbours_hardly_matter():
    documents = [f"document {i}".encode() for i in range(200)]
    _, before = sides(documents)
    _, reverse = sides(documents[::-1])
    assert sorted(before) == sorted(reverse)
    _, after = sides(documents + [b"one more"])
    assert len(set(before) ^ set(after)) <= 2


@given(texts.filter(lambda documents: 0 < len(documents) < 20))
def test_few_documents_are_split_by_position(documents):
    train, validation = sides(documents)
    assert b"".join(train + validation) == b"".join(documents)
    for part in train + validation:
        part.decode("utf-8")  # no character is cut
    total = sum(map(len, documents))
    assert total / 10 <= sum(map(len, validation)) < total / 10 + 4


def test_bytes_that_are_not_utf8_are_split_too():
    assert sides([b"\x80" * 100]) == ([b"\x80" * 90], [b"\x80" * 10])


def test_whole_is_scored_whole():
    for documents in ([b"one"], [f"{i}".encode() for i in range(30)]):
        assert sides(documents, whole=True) == ([], documents)


def test_a_source_without_text():
    with pytest.raises(UserError, match="holds no text"):
        divided([b""])


def test_a_source_that_changes_while_it_is_read():
    documents = [b"one", b"two"]
    split = divided(documents)
    documents[1] = b"owt"
    with pytest.raises(UserError, match="changed while it was read"):
        list(split.documents("train"))
