import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkvjax.data.tokenizers import load_tokenizer, tokenizer_size
from qkvjax.errors import UserError


@given(st.binary(max_size=60))
def test_bytes_keep_every_byte(document):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(document)
    assert ids.dtype == np.int32 and bytes(ids.tolist()) == document
    assert tokenizer.num_bytes[ids].sum() == len(document)
    assert tokenizer.bytes_of(ids) == tokenizer.bytes_of([256, *ids]) == document
    assert tokenizer.decode([256, *ids, 256]) == document.decode("utf-8", errors="replace")


def test_bytes_sizes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.num_ids, tokenizer.separator) == (257, 256)
    assert tokenizer_size("bytes") == 257
    assert tokenizer.num_bytes.shape == (257,) and tokenizer.num_bytes[256] == 0


def test_gpt2_size_needs_no_file():
    assert tokenizer_size("gpt2:/nowhere") == 50257


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("byts", "did you mean 'bytes'"),
        ("bytes:x", "bytes alone"),
        ("bpe", "bpe:PATH"),
        ("bpe:/nowhere.json", "check the path"),
    ],
)
def test_unknown_names(name, remedy):
    with pytest.raises(UserError, match=remedy):
        tokenizer_size(name)


def test_gpt2_folder_without_files(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match="encoder.json or vocab.json"):
        load_tokenizer(f"gpt2:{tmp_path}")
    (tmp_path / "encoder.json").write_text('{"a": 0}')
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="not a vocabulary of GPT-2's 50,257 ids"):
        load_tokenizer(f"gpt2:{tmp_path}")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """(folder with the files of a made-up vocabulary of GPT-2's size, its tokens in order)."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("gpt2")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + ["ab", "abc"] + [f"Ġ{i}" for i in range(50256 - 258)] + ["<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    return folder, tokens


def test_gpt2_from_either_file(gpt2):
    folder, tokens = gpt2
    for path in (folder, folder / "vocab.json", folder / "merges.txt"):
        tokenizer = load_tokenizer(f"gpt2:{path}")
        assert (tokenizer.name, tokenizer.num_ids, tokenizer.separator) == ("gpt2", 50257, 50256)
        ids = tokenizer.encode(b"abcab")
        assert [tokens[i] for i in ids] == ["abc", "ab"]
        assert tokenizer.num_bytes[ids].tolist() == [3, 2]


def test_gpt2_separator_stands_for_no_bytes(gpt2):
    """The name of the separator is made of ASCII characters, which stand for bytes elsewhere."""
    tokenizer = load_tokenizer(f"gpt2:{gpt2[0]}")
    assert tokenizer.num_bytes[50256] == 0 and tokenizer.bytes_of([50256]) == b""
    assert np.flatnonzero(tokenizer.num_bytes == 0).tolist() == [50256]


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    return train_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json", ["<|endoftext|>"])


def train_bpe(path, special):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the cat and the dog, naïve"] * 9, trainer)
    bpe.add_tokens(["né"])
    bpe.save(str(path))
    return path


def test_bpe_keeps_every_byte(bpe_path):
    tokenizer = load_tokenizer(f"bpe:{bpe_path}")
    assert tokenizer.num_ids == tokenizer_size(f"bpe:{bpe_path}")
    assert tokenizer.table[tokenizer.separator] == b""

    @given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
    def check(text):
        ids = tokenizer.encode(text.encode())
        assert tokenizer.num_bytes[ids].sum() == len(text.encode())
        assert tokenizer.bytes_of(ids) == text.encode()
        assert tokenizer.decode(ids) == text

    check()
    assert len(tokenizer.encode(b"the cat")) < 7


def test_bpe_reads_a_spelled_separator_as_characters(bpe_path):
    tokenizer = load_tokenizer(f"bpe:{bpe_path}")
    ids = tokenizer.encode("a <|endoftext|> né".encode())
    assert tokenizer.separator not in ids
    assert tokenizer.decode(ids) == "a <|endoftext|> né"


def test_bpe_without_a_separator_gets_one_more_id(tmp_path):
    path = train_bpe(tmp_path / "tokenizer.json", [])
    tokenizer = load_tokenizer(f"bpe:{path}")
    ids = {**json.loads(path.read_text())["model"]["vocab"], "né": tokenizer.num_ids - 2}
    assert tokenizer.separator == max(ids.values()) + 1 == tokenizer.num_ids - 1
    assert tokenizer_size(f"bpe:{path}") == tokenizer.num_ids


@pytest.mark.parametrize(
    ("special", "separator"),
    [
        (["<eos>", "</s>", "<|endoftext|>"], "<|endoftext|>"),
        (["<eos>", "<pad>", "</s>"], "</s>"),
        (["<pad>", "<eos>"], "<eos>"),
    ],
)
def test_bpe_separator_is_the_best_known_of_the_special_tokens(tmp_path, special, separator):
    """No special token stands for bytes, whichever of them is the separator."""
    tokenizer = load_tokenizer(f"bpe:{train_bpe(tmp_path / 'tokenizer.json', special)}")
    assert tokenizer.separator == special.index(separator)
    assert np.flatnonzero(tokenizer.num_bytes == 0).tolist() == list(range(len(special)))


def test_bpe_refuses_what_is_not_utf8(bpe_path):
    with pytest.raises(UserError, match="not UTF-8.*tokenizer=bytes"):
        load_tokenizer(f"bpe:{bpe_path}").encode(b"ab\xff")


def test_bpe_refuses_a_tokenizer_that_loses_bytes(tmp_path, bpe_path):
    content = json.loads(bpe_path.read_text()) | {"normalizer": {"type": "Lowercase"}}
    path = tmp_path / "lower.json"
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(f"bpe:{path}")
    tokenizer.encode(b"lower")
    with pytest.raises(UserError, match="does not give back.*byte-level"):
        tokenizer.encode(b"Upper")


def test_bpe_refuses_other_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        tokenizer_size(f"bpe:{path}")
    path.write_text('{"model": {"vocab": [["a", 0]]}}')
    with pytest.raises(UserError, match="no BPE vocabulary"):
        tokenizer_size(f"bpe:{path}")


def test_a_missing_library_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install qkvjax\[bpe\]"):
        load_tokenizer(f"bpe:{tmp_path}")
