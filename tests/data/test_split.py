import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkvjax.data.split import Divider
from qkvjax.data.utf8 import character_start
from qkvjax.errors import UserError


def divided(documents, whole=False):
    divider = Divider()
    for document in filter(None, documents):
        divider.add(hashlib.sha256(document).digest(), len(document))
    return divider.divide("made up", whole)


def sides(documents, whole=False):
    """The bytes of the documents of both splits."""
    split = divided(documents, whole)
    if not split.by_position:
        digests = [list(hashlib.sha256(document).digest()) for document in documents]
        held_out = split.held_out(np.array(digests, np.uint8))
        pairs = list(zip(documents, held_out, strict=True))
        return [d for d, held in pairs if not held], [d for d, held in pairs if held]
    cuts = [character_start(d, split.cuts[hashlib.sha256(d).digest()]) for d in documents]
    heads = [document[:at] for document, at in zip(documents, cuts, strict=True)]
    tails = [document[at:] for document, at in zip(documents, cuts, strict=True)]
    return list(filter(None, heads)), list(filter(None, tails))


texts = st.lists(st.text(min_size=1, max_size=9).map(lambda text: text.encode("utf-8", "replace")))


@given(texts.filter(lambda documents: len(documents) >= 20))
def test_a_tenth_by_content(documents):
    train, validation = sides(documents)
    assert sorted(train + validation) == sorted(documents)
    assert not set(train) & set(validation)
    assert len(set(validation)) == max(1, round(len(set(documents)) / 10))
    assert divided(documents).num_duplicates == len(documents) - len(set(documents))


def test_order_and_neighbours_hardly_matter():
    documents = [f"document {i}".encode() for i in range(200)]
    _, before = sides(documents)
    _, reverse = sides(documents[::-1])
    assert sorted(before) == sorted(reverse)
    _, after = sides(documents + [b"one more"])
    assert len(set(before) ^ set(after)) <= 2


few = texts.filter(lambda documents: 0 < len(documents) < 20)


@given(few.filter(lambda documents: len(set(documents)) == len(documents)))
def test_few_documents_are_split_by_position(documents):
    train, validation = sides(documents)
    assert b"".join(train + validation) == b"".join(documents)
    for part in train + validation:
        part.decode("utf-8")  # no character is cut
    total = sum(map(len, documents))
    assert total / 10 <= sum(map(len, validation)) < total / 10 + 4
    assert not divided(documents).moved


@given(few, st.randoms())
def test_copies_are_divided_alike(documents, random):
    """Whatever is copied, and wherever the copies stand."""
    copies = documents + random.choices(documents, k=min(5, 19 - len(documents)))
    split = divided(copies)
    assert split.num_duplicates == len(copies) - len(set(copies))
    plain = divided(list(dict.fromkeys(documents)))
    assert split.cuts == plain.cuts


def test_copies_at_the_end_are_not_held_out():
    """Fourteen files of which the last two repeat the first two."""
    documents = [bytes([65 + i]) * 100 for i in range(12)]
    train, validation = sides(documents + documents[:2])
    assert set(train).isdisjoint(validation)
    assert train[:2] == train[-2:] == documents[:2]
    assert sum(map(len, validation)) == 120
    split = divided(documents + documents[:2])
    assert split.num_duplicates == 2 and split.moved


def test_bytes_that_are_not_utf8_are_split_too():
    assert sides([b"\x80" * 100]) == ([b"\x80" * 90], [b"\x80" * 10])


def test_whole_is_scored_whole():
    for documents in ([b"one"], [f"{i}".encode() for i in range(30)]):
        assert sides(documents, whole=True) == ([], documents)


def test_a_source_without_text():
    with pytest.raises(UserError, match="holds no text"):
        divided([b""])


def test_the_digest_is_that_of_the_documents_in_order():
    documents = [b"one", b"two", b"one"]
    hashes = b"".join(hashlib.sha256(document).digest() for document in documents)
    assert divided(documents).digest == hashlib.sha256(hashes).hexdigest()
    assert divided(documents[::-1]).digest == divided(documents).digest
    assert divided([b"two", b"one"]).digest != divided([b"one", b"two"]).digest
