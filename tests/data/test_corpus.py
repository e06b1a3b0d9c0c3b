"""The tokens of each split are those of its documents, tokenised on their own."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkvjax.data import cutting
from qkvjax.data import parts as partitions
from qkvjax.data.corpus import Corpus
from qkvjax.data.parts import Parts
from qkvjax.data.split import SPLITS, Divider
from qkvjax.data.tokenizers import load_tokenizer
from qkvjax.data.utf8 import character_start

words = [
    "the cat",
    " and",
    " the dog",
    ",",
    "\n",
    "\n\n",
    " ",
    "  ",
    "é",
    "naïve ",
    "12",
    "Don't",
    "/",
]
texts = st.lists(st.sampled_from(words), min_size=1, max_size=30).map("".join)
documents = st.lists(texts.map(str.encode), min_size=1, max_size=30)


@pytest.fixture(scope="module", params=["bytes", "bpe", "whole_bpe"])
def tokenizer(request):
    if request.param == "bytes":
        return load_tokenizer("bytes")
    return load_tokenizer(f"bpe:{request.getfixturevalue(request.param)}")


def corpus_of(folder, documents, tokenizer):
    parts = Parts(Path(folder), np.uint16, tokenizer.separator)
    divider = Divider()
    for document in documents:
        digest = hashlib.sha256(document).digest()
        divider.add(digest, len(document))
        parts.begin_document()
        for piece in tokenizer.pieces(document):
            parts.add(tokenizer.encode_piece(piece))
        parts.end_document(digest, len(document))
    parts.finish()
    split = divider.divide("made up")
    return Corpus(parts, split, tokenizer), split


def shares(documents, split, name):
    """Yields the documents of a split as bytes."""
    for document in documents:
        digest = hashlib.sha256(document).digest()
        if split.by_position:
            at = character_start(document, split.cuts[digest])
            share = document[at:] if name == "validation" else document[:at]
            if share:
                yield share
        elif split.held_out(np.array([list(digest)], np.uint8))[0] == (name == "validation"):
            yield document


def test_the_ids_of_both_splits(tokenizer, monkeypatch):
    monkeypatch.setattr(cutting, "_WINDOW", 8)
    monkeypatch.setattr(partitions, "PART_BYTES", 200)

    @settings(max_examples=60)
    @given(documents)
    def check(documents):
        with tempfile.TemporaryDirectory() as folder:
            corpus, split = corpus_of(folder, documents, tokenizer)
            for name in SPLITS:
                expected = [tokenizer.encode(share) for share in shares(documents, split, name)]
                read = list(corpus.documents(name))
                assert [ids.tolist() for ids in read] == [ids.tolist() for ids in expected]
                stream = [i for ids in expected for i in (tokenizer.separator, *ids.tolist())]
                assert [i for part in corpus.stream(name) for i in part.tolist()] == stream
                rows = [max(0, (len(stream) - 1) // 5), sum(-(-len(i) // 5) for i in expected)]
                for packed, count in zip((True, False), rows, strict=True):
                    total = sum(map(len, expected))
                    assert corpus.num_rows(name, 5, packed, False) == (count, total)
                assert corpus.num_rows(name, 5, False, True)[0] == len(expected)

    check()


def test_only_the_surroundings_of_a_cut_are_tokenised_again(bpe, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(f"bpe:{bpe}")
    document = "the cat and the dog, naïve. " * 40_000
    corpus, split = corpus_of(tmp_path, [document.encode()], tokenizer)
    seen = []
    encode = type(tokenizer).encode
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, text: seen.append(len(text)) or encode(self, text)
    )
    (ids,) = corpus.documents("validation")
    monkeypatch.undo()
    (share,) = shares([document.encode()], split, "validation")
    np.testing.assert_array_equal(ids, tokenizer.encode(share))
    assert sum(seen) < 1000


def test_sizes(tmp_path):
    tokenizer = load_tokenizer("bytes")
    texts = [b"a" * 10, b"b" * 20, b"c" * 70]
    corpus, _ = corpus_of(tmp_path, texts, tokenizer)
    assert corpus.sizes("train") == (90, 60)
    assert corpus.sizes("validation") == (10, 10)


def test_parts_that_were_not_finished_are_written_again(tmp_path):
    parts = Parts(tmp_path, np.uint16, 256)
    for name in (b"a", b"b"):
        parts.begin_document()
        parts.add(np.array([1, 2]))
        parts.end_document(name * 32, 2)
        if name == b"a":
            parts.finish()
    assert (tmp_path / "00001.ids").exists()
    again = Parts(tmp_path, np.uint16, 256)
    assert len(again) == 1
    again.begin_document()
    again.add(np.array([3]))
    again.end_document(b"c" * 32, 1)
    again.finish()
    first, second = again
    assert first.ids.tolist() == [256, 1, 2] and second.ids.tolist() == [256, 3]
    assert [part.digests.tobytes() for part in again] == [b"a" * 32, b"c" * 32]
