"""A workdir is self-contained, and checks what it is used with."""

import json
import shutil

import numpy as np
import pytest

import qkvjax

tokenizers = pytest.importorskip("tokenizers")

FLAGS = (
    "--config.train.steps=4",
    "--config.train.checkpoint_every=4",
    "--config.train.log_every=2",
)


def make_tokenizer(path, turned=False):
    """A byte-level BPE of 256 bytes, two merges and a separator; `turned` exchanges two ids, which
    leaves the file as long as it was."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=259, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(["the cat and the dog"] * 9, trainer)
    content = json.loads(bpe.to_str())
    vocabulary = content["model"]["vocab"]
    if turned:
        vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def trained(run_command, recipe, folders):
    """(workdir, tokenizer's file) of a run with a BPE; tests copy what they change."""
    folder = folders / "bpe"
    folder.mkdir()
    path = make_tokenizer(folder / "mine.json")
    result = run_command(
        "train",
        f"--config={recipe}",
        f"--config.data.tokenizer=bpe:{path}",
        f"--workdir={folder / 'run'}",
        *FLAGS,
    )
    assert result.code == 0, result.err
    return folder / "run", path


def score(run_command, workdir, *flags):
    result = run_command("evaluate", f"--workdir={workdir}", *flags)
    assert result.code == 0, result.err
    return json.loads((workdir / "evaluation.jsonl").read_text().splitlines()[-1])


def test_the_copy_is_used_whatever_becomes_of_the_file(run_command, trained, copy, tmp_path):
    workdir, path = copy(trained[0]), trained[1]
    before = score(run_command, workdir)
    whole = path.read_bytes()
    try:
        make_tokenizer(path, turned=True)
        assert len(path.read_bytes()) == len(whole) and path.read_bytes() != whole
        assert score(run_command, workdir)["value"] == before["value"]
        path.unlink()
        moved = shutil.move(workdir, tmp_path / "elsewhere")
        assert score(run_command, moved)["value"] == before["value"]
        _, tokenizer, config = qkvjax.load(moved)
        assert config.data.tokenizer == f"bpe:{moved}/tokenizer.json"
        assert tokenizer.decode(tokenizer.encode("the dog")) == "the dog"
        result = run_command("generate", f"--workdir={moved}", "--max_tokens=3")
        assert result.code == 0, result.err
    finally:
        path.write_bytes(whole)


def test_a_copy_that_changed_is_refused(run_command, trained, copy):
    workdir = copy(trained[0])
    make_tokenizer(workdir / "tokenizer.json", turned=True)
    for command in ("evaluate", "generate", "analyze"):
        result = run_command(command, f"--workdir={workdir}")
        assert result.code == 2 and "is not the one its model was trained with" in result.err
        assert str(trained[1]) in result.err  # where it came from
    (workdir / "tokenizer.json").unlink()
    result = run_command("generate", f"--workdir={workdir}")
    assert result.code == 2 and "tokenizer.json is missing" in result.err


def test_a_run_does_not_go_on_with_another_tokenizer(run_command, recipe, trained, copy, tmp_path):
    workdir = copy(trained[0])
    other = make_tokenizer(tmp_path / "other.json", turned=True)
    flags = (f"--config={recipe}", f"--workdir={workdir}", *FLAGS)
    result = run_command("train", *flags, f"--config.data.tokenizer=bpe:{other}")
    assert result.code == 2 and f"data.tokenizer: 'bpe:{trained[1]}' -> 'bpe:{other}'" in result.err
    shutil.copy(trained[1], tmp_path / "saved.json")
    try:
        shutil.copy(other, trained[1])
        result = run_command("train", *flags, f"--config.data.tokenizer=bpe:{trained[1]}")
        remedy = f"--config.data.tokenizer=bpe:{workdir}/tokenizer.json"
        assert (
            result.code == 2 and "is not the tokenizer that" in result.err and remedy in result.err
        )
        result = run_command("train", *flags, remedy)
        assert result.code == 0 and "nothing left to train" in result.out
    finally:
        shutil.copy(tmp_path / "saved.json", trained[1])


def test_a_workdir_of_an_earlier_version_is_read_as_before(run_command, trained, copy):
    workdir = copy(trained[0])
    (workdir / "tokenizer.json").unlink()
    (workdir / "tokenizer_copy.json").unlink()
    score(run_command, workdir)
    assert qkvjax.load(workdir)[2].data.tokenizer == f"bpe:{trained[1]}"


def test_gpt2_files_are_copied_by_their_names(tmp_path):
    from qkvjax.training.identity import keep_tokenizer, workdir_tokenizer

    folder, workdir = tmp_path / "gpt2", tmp_path / "run"
    folder.mkdir()
    workdir.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}")
    assert keep_tokenizer(workdir, f"gpt2:{folder}") == f"gpt2:{workdir}"
    assert workdir_tokenizer(workdir, f"gpt2:{folder}") == f"gpt2:{workdir}"
    assert (workdir / "vocab.json").read_text() == "{}" and (workdir / "merges.txt").exists()


def test_a_file_in_the_way_is_not_overwritten(run_command, recipe, trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text("mine")
    flags = (f"--config={recipe}", f"--workdir={tmp_path}", *FLAGS)
    result = run_command("train", *flags, f"--config.data.tokenizer=bpe:{trained[1]}")
    assert result.code == 2 and "tokenizer.json is in the way" in result.err
    assert (tmp_path / "tokenizer.json").read_text() == "mine"


@pytest.fixture
def small(run_command, recipe, tmp_path):
    """(workdir, folder of documents, flags) of a run on so few documents that the last of them by
    name are held out."""
    texts = tmp_path / "texts"
    texts.mkdir()
    rng = np.random.default_rng(0)
    for i in range(9):
        words = rng.choice(["cat", "dog", "mat", "ran"], 60)
        (texts / f"{i}.txt").write_text(f"{i} " + " ".join(words))
    flags = (f"--config={recipe}", f"--workdir={tmp_path / 'run'}", *FLAGS)
    result = run_command("train", *flags, f"--config.data.source=text:{texts}")
    assert result.code == 0, result.err
    return tmp_path / "run", texts, flags


@pytest.mark.parametrize("change", ["rename", "edit", "add", "remove"])
def test_data_that_changed_are_not_scored_as_held_out(run_command, small, change):
    workdir, texts, _ = small
    score(run_command, workdir)
    if change == "rename":
        (texts / "8.txt").rename(texts / "0a.txt")
    elif change == "edit":
        (texts / "3.txt").write_text("another text")
    elif change == "add":
        (texts / "9.txt").write_text("one more text")
    else:
        (texts / "0.txt").unlink()
    for command in ("evaluate", "analyze"):
        result = run_command(command, f"--workdir={workdir}")
        assert result.code == 2, result.out
        assert "is not what" in result.err and "--data=text:PATH" in result.err
    assert len((workdir / "evaluation.jsonl").read_text().splitlines()) == 2
    result = run_command("evaluate", f"--workdir={workdir}", f"--data=text:{texts}")
    assert result.code == 0 and "most of this text it has seen" in result.out


def test_the_same_data_by_another_path(run_command, small, monkeypatch, lines):
    workdir, texts, flags = small
    monkeypatch.chdir(texts.parent)
    for path in ("texts", "./texts", f"{texts}/", f"{texts}/../texts"):
        result = run_command("train", *flags, f"--config.data.source=text:{path}")
        assert result.code == 0 and "nothing left to train" in result.out, result.err
    result = run_command("evaluate", f"--workdir={workdir}", "--data=text:./texts")
    assert "most of this text it has seen" in result.out
    shutil.copytree(texts, "moved")
    result = run_command("train", *flags, "--config.data.source=text:moved")
    assert result.code == 0, result.err
    (texts.parent / "moved" / "3.txt").write_text("another text")
    result = run_command("train", *flags, "--config.data.source=text:moved")
    assert result.code == 2 and f"data.source: 'text:{texts}' -> 'text:moved'" in result.err
