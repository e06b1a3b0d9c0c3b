import json
import sys
import time

import numpy as np
import pytest

from qkvjax.data.sources import TokenFiles, open_source
from qkvjax.errors import UserError


def read(source):
    return list(open_source(source).documents())


def test_stdlib_is_sorted_and_leaves_tests_out():
    source = open_source("stdlib")
    names = [str(file) for file in source.files]
    assert len(names) > 100
    assert not any(f"/{part}/" in name for name in names for part in ("test", "site-packages"))
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert next(source.documents())


def test_text_takes_files_folders_and_globs(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name, content in {
        "b.txt": "two",
        "a.md": "one",
        "sub/c.txt": "three",
        ".hidden": "x",
        "sub/.git/x": "x",
        "empty.txt": "",
    }.items():
        (tmp_path / name).write_text(content)
    assert read(f"text:{tmp_path}/b.txt") == [b"two"]
    assert read(f"text:{tmp_path}") == [b"one", b"two", b"three"]
    assert read(f"text:{tmp_path}/*.txt") == [b"two"]
    assert read(f"text:{tmp_path}/**/*.txt") == [b"two", b"three"]


def test_key_changes_with_the_content(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = open_source(f"text:{file}").key()
    assert open_source(f"text:{file}").key() == before
    file.write_text("longer")
    assert open_source(f"text:{file}").key() != before


def test_jsonl(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "é", "body": "x"}\n\n{"text": "b", "body": ""}\n')
    assert read(f"jsonl:{file}") == ["é".encode(), b"b"]
    assert read(f"jsonl:{file}#body") == [b"x"]
    assert read(f"jsonl:{tmp_path}/*.jsonl#body") == [b"x"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": ', "line 2: not JSON"),
        ('{"txt": "a"}', "line 2: no field 'text'.*did you mean 'txt'"),
        ("[1]", "line 2: no field 'text' among none"),
        ('{"text": 3}', "line 2: field 'text' is not text"),
        ('{"text": "\\ud800"}', "line 2: field 'text' is not text"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read(f"jsonl:{file}")


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["é", None, "b"], "n": [1, 2, 3]})
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, file)
    assert read(f"parquet:{file}") == ["é".encode(), b"b"]
    assert read(f"parquet:{tmp_path}#text") == ["é".encode(), b"b"]
    with pytest.raises(UserError, match="no column 'txt'.*did you mean 'text'"):
        open_source(f"parquet:{file}#txt")
    with pytest.raises(UserError, match="column 'n' is not text"):
        read(f"parquet:{file}#n")
    file.write_text("no")
    with pytest.raises(UserError, match="is not a parquet file"):
        open_source(f"parquet:{file}")


def test_tokens(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(4, dtype=np.uint16).tofile(tmp_path / name)
    file = tmp_path / "train.bin"
    assert open_source(f"tokens:{file}") == TokenFiles(f"tokens:{file}", file)
    assert open_source(f"tokens:{tmp_path}").validation == tmp_path / "val.bin"
    (tmp_path / "val.bin").unlink()
    with pytest.raises(UserError, match="val.bin is missing"):
        open_source(f"tokens:{tmp_path}")


def test_kjv_is_a_document_a_chapter():
    pytest.importorskip("bible")
    documents = read("kjv")
    assert len(documents) == 1189
    assert documents[0].startswith(b"In the beginning God created the heaven and the earth.\nAnd")


def test_kjv_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install qkvjax\[kjv\]"):
        open_source("kjv")


@pytest.mark.parametrize(
    "source, remedy",
    [
        ("stdlb", "did you mean 'stdlib'"),
        ("txt:a", "did you mean 'text'"),
        ("text", "write text:PATH"),
        ("text:", "write text:PATH"),
        ("stdlib:x", "write stdlib"),
        ("text:/nowhere/at/all", "nothing is at /nowhere/at/all"),
        ("jsonl:/nowhere/*.jsonl", "nothing is at"),
        ("tokens:/nowhere.bin", "nothing is at"),
    ],
)
def test_unknown_and_missing_sources(source, remedy):
    with pytest.raises(UserError, match=remedy):
        open_source(source)


def test_a_folder_without_the_right_files(tmp_path):
    with pytest.raises(UserError, match="holds no file"):
        open_source(f"text:{tmp_path}")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="holds no .jsonl file"):
        open_source(f"jsonl:{tmp_path}")


@pytest.fixture
def tfds_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


def prepare_tfds(folder, features, rows):
    """A small data set `little_letters`, in splits train and test."""
    import tensorflow_datasets as tfds

    class LittleLetters(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": enumerate(rows), "test": enumerate(rows[:1])}

        def _generate_examples(self):
            raise AssertionError

    tfds.disable_progress_bar()
    LittleLetters(data_dir=folder, file_format="array_record").download_and_prepare()


def test_tfds(tfds_folder):
    import tensorflow_datasets as tfds

    texts = {"text": tfds.features.Text(), "title": tfds.features.Text()}
    prepare_tfds(tfds_folder, texts, [{"text": f"é{i}", "title": "t"} for i in range(3)])
    assert read("tfds:little_letters") == ["é0".encode(), "é1".encode(), "é2".encode()]
    assert read("tfds:little_letters/1.0.0#test") == ["é0".encode()]
    assert read("tfds:little_letters#train[1:]") == ["é1".encode(), "é2".encode()]
    with pytest.raises(UserError, match="splits train, test, not 'tst'.*did you mean 'test'"):
        read("tfds:little_letters#tst")
    assert "tensorflow" not in sys.modules


def test_tfds_without_a_text(tfds_folder):
    import tensorflow_datasets as tfds

    texts = {"a": tfds.features.Text(), "b": tfds.features.Text()}
    prepare_tfds(tfds_folder, texts, [{"a": "1", "b": "2"}])
    with pytest.raises(UserError, match="no Text feature 'text' and 2 others"):
        read("tfds:little_letters")


def test_tfds_that_is_absent_is_refused_at_once(tfds_folder):
    start = time.monotonic()
    with pytest.raises(UserError, match="not prepared.*TensorFlow.*TFDS_DATA_DIR"):
        open_source("tfds:lm1b")
    assert time.monotonic() - start < 5  # a download would retry for minutes


def test_tfds_in_another_file_format(tfds_folder):
    folder = tfds_folder / "old" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="is tfrecord, which needs TensorFlow"):
        open_source("tfds:old")


def test_tfds_config_has_to_be_named(tfds_folder):
    for config in ("a", "b"):
        folder = tfds_folder / "two" / config / "1.0.0"
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="use one of tfds:two/a, tfds:two/b"):
        open_source("tfds:two")
