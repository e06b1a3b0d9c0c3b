"""The ids of words and pieces are the ids of the whole text, as the library gives them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkvjax.data import tokenizers as ours
from qkvjax.data.tokenizers import load_tokenizer
from qkvjax.data.words import EXPRESSIONS, gather, safe_cut, word_expression

library = pytest.importorskip("tokenizers")
# What the expressions treat in different ways, each kind several times.
LETTERS = ["a", "b", "Bc", "don", "THE", "é", "ж", "中", "ʼ", "\u0301"]
OTHERS = [
    "'",
    "'s",
    "'LL",
    ".",
    ",",
    "!",
    '"',
    "(",
    ")",
    "/",
    "_",
    "-",
    "§",
    "。",
    "😀",
    "\x1c",
    "\x00",
]
SPACES = [
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\x0b",
    "\u00a0",
    "\u2003",
    "\u3000",
]
NUMBERS = ["1", "23", "4567", "²", "٣", "Ⅷ"]
texts = st.lists(st.sampled_from(LETTERS + OTHERS + SPACES + NUMBERS), max_size=30).map("".join)


def byte_level(**options):
    return library.pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def split_by(expression):
    split = library.pre_tokenizers.Split(library.Regex(expression), "isolated")
    return library.pre_tokenizers.Sequence([split, byte_level(use_regex=False)])


def digits():
    steps = [library.pre_tokenizers.Digits(individual_digits=True), byte_level()]
    return library.pre_tokenizers.Sequence(steps)


KINDS = {"gpt2": byte_level(), "digits": digits()} | {
    f"expression {i}": split_by(expression) for i, expression in enumerate(EXPRESSIONS)
}


@pytest.fixture(scope="module", params=KINDS, ids=str)
def path(request, tmp_path_factory):
    """A tokenizer.json whose merges cross every kind of boundary that the expression allows."""
    bpe = library.Tokenizer(library.models.BPE())
    bpe.pre_tokenizer = KINDS[request.param]
    trainer = library.trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(0)
    symbols = LETTERS + OTHERS + SPACES + NUMBERS
    lines = ["".join(rng.choice(symbols, 40)) for _ in range(2000)]
    bpe.train_from_iterator(lines, trainer)
    bpe.add_tokens(["don'"])
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    bpe.save(str(path))
    return path


def whole(path):
    """Returns the library's function from a text, as a whole, to its ids."""
    bpe = library.Tokenizer.from_file(str(path))
    bpe.encode_special_tokens = True
    return lambda text: bpe.encode(text, add_special_tokens=False).ids


def test_words_have_the_ids_of_the_whole_text(path):
    tokenizer = load_tokenizer(f"bpe:{path}")
    reference = whole(path)
    assert tokenizer.cuts == "words"

    @settings(max_examples=150)
    @given(texts)
    def check(text):
        assert tokenizer.encode(text).tolist() == reference(text)

    check()


def test_pieces_have_the_ids_of_the_whole_text(path, monkeypatch):
    tokenizer = load_tokenizer(f"bpe:{path}")
    reference = whole(path)
    monkeypatch.setattr(ours, "_PIECE_BYTES", 24)

    @settings(max_examples=80)
    @given(st.lists(texts, min_size=3, max_size=6).map("xy z\n".join))
    def check(text):
        pieces = list(tokenizer.pieces(text.encode()))
        assert b"".join(pieces) == text.encode()
        assert tokenizer.encode(text).tolist() == reference(text)

    check()
    long = "the cat, and the dog.\n" * 20
    assert len(list(tokenizer.pieces(long.encode()))) > 10


def test_words_are_forgotten_before_they_fill_the_memory(path, monkeypatch):
    tokenizer = load_tokenizer(f"bpe:{path}")
    reference = whole(path)
    monkeypatch.setattr("qkvjax.data.words._MAX_WORDS", 5)
    for i in range(20):
        text = f"word{i} and {i} others"
        assert tokenizer.encode(text).tolist() == reference(text)
        assert len(tokenizer._encode.by_word._numbers) <= 8


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"model": {"dropout": 0.1}},
        {"added_tokens": [{"content": "two words", "special": False}]},
        {"added_tokens": [{"content": "x", "special": False, "lstrip": True}]},
    ],
)
def test_tokenizers_that_were_not_examined_stay_whole(change):
    known = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    assert word_expression(known) is not None
    assert word_expression(known | change) is None


def test_an_unknown_expression_stays_whole(tmp_path):
    bpe = library.Tokenizer(library.models.BPE())
    bpe.pre_tokenizer = split_by(r"\w+ \w+|.")
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["a b a b"] * 20, trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(f"bpe:{tmp_path / 'tokenizer.json'}")
    assert tokenizer.cuts == "nowhere" and len(tokenizer.encode("a b")) == 1
    document = b"a b " * 10**6
    assert list(tokenizer.pieces(document)) == [document]


def test_safe_cut():
    document = b"ab cd\nef  gh"
    assert safe_cut(document, 0, len(document)) == 6
    assert safe_cut(document, 0, 6) == 2
    assert safe_cut(document, 2, 4) is None
    assert safe_cut("é é".encode(), 0, 5) == 2
    long = ("aé b" + "c" * 10**5).encode()
    assert safe_cut(long, 0, len(long)) == 3
    with pytest.raises(UnicodeDecodeError):
        safe_cut(b"ab\xff cd", 0, 6)


def test_gather():
    values = np.arange(10)
    gathered = gather(values, np.array([7, 0, 3]), np.array([2, 0, 3]))
    assert gathered.tolist() == [7, 8, 3, 4, 5]
    assert gather(values, np.empty(0, int), np.empty(0, int)).tolist() == []


def test_the_expressions_are_those_of_published_tokenizers():
    """Llama 3's and Qwen 2's, as their tokenizer.json write them."""
    llama = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert llama in EXPRESSIONS and llama.replace("{1,3}", "") in EXPRESSIONS
