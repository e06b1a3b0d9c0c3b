import json

import pytest


@pytest.fixture(autouse=True)
def data_folder(tmp_path_factory, monkeypatch):
    """An empty data folder for each test."""
    folder = tmp_path_factory.mktemp("prepared")
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def corpus(tmp_path):
    """A folder of 40 documents of different lengths, with an accent in each."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        words = " ".join(f"{i}.{j}" for j in range(i % 7 * 8))
        (folder / f"{i:02d}.txt").write_text(f"document é {i}: {words}")
    return folder


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A small byte-level BPE with GPT-2's expression: the path of its tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the cat and the dog, naïve words  of\n\nan éclair. Don't stop 1234!\n"
    library.train_from_iterator([text, text.upper(), text.replace(" ", "\n")] * 9, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    library.save(str(path))
    return path


@pytest.fixture(scope="session")
def whole_bpe(bpe):
    """The same with an expression that is not known, so that documents stay whole."""
    content = json.loads(bpe.read_text())
    split = {"type": "Split", "pattern": {"Regex": "\\w+ ?|\\W"}, "behavior": "Isolated"}
    byte_level = content["pre_tokenizer"] | {"use_regex": False}
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split | {"invert": False}, byte_level],
    }
    path = bpe.with_name("whole.json")
    path.write_text(json.dumps(content))
    return path
