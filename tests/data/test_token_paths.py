"""Which files `tokens:PATH` means, and which of them are held out."""

import numpy as np
import pytest

from qkvjax.data.sources import open_source
from qkvjax.errors import UserError


@pytest.fixture
def files(tmp_path):
    """Writes files of a few ids."""

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            np.arange(100, dtype="<u2").tofile(tmp_path / name)
        return tmp_path

    return make


def split(folder, source):
    """Names of the files to train on, to hold out and left out."""
    source_files = open_source(source)
    train, validation = (
        [file.relative_to(folder).as_posix() for file in files]
        for files in (source_files.train_files, source_files.validation_files)
    )
    return [train, validation, list(source_files.left_out)]


def test_names_with_train_and_val_are_the_splits(files):
    names = ["fineweb_train_000002.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    folder = files(*names)
    expected = [[names[1], names[0]], [names[2]], []]
    assert split(folder, f"tokens:{folder}") == expected
    assert split(folder, f"tokens:{folder}/*.bin") == expected
    files("fineweb_test_000000.bin")
    assert split(folder, f"tokens:{folder}")[2] == ["fineweb_test_000000.bin"]
    assert "1 of 4 files are left out: fineweb_test" in open_source(f"tokens:{folder}").notes()[0]


def test_folders_with_train_and_val_are_the_splits(files):
    folder = files("train/0.bin", "train/1.bin", "val/0.bin")
    expected = [["train/0.bin", "train/1.bin"], ["val/0.bin"], []]
    assert split(folder, f"tokens:{folder}") == expected
    assert split(folder, f"tokens:{folder}/*/*.bin") == expected


def test_a_pair_stays_a_pair(files):
    folder = files("train.bin", "val.bin", "train_more.bin")
    assert split(folder, f"tokens:{folder}") == [["train.bin"], ["val.bin"], []]


def test_files_of_one_kind_are_divided(files):
    folder = files("a_train_1.bin", "a_train_2.bin", "retrieval_1.bin")
    every = ["a_train_1.bin", "a_train_2.bin"]
    assert split(folder, f"tokens:{folder}/a_train_*.bin") == [every, [], []]
    assert split(folder, f"tokens:{folder}/*.bin") == [[*every, "retrieval_1.bin"], [], []]
    with pytest.raises(UserError, match="val.bin is missing.*'val' in their names.*by a glob"):
        open_source(f"tokens:{folder}")


def test_a_folder_of_other_names_is_one_stream(files):
    folder = files("1.bin", "0.npy")
    np.save(folder / "0.npy", np.arange(9))
    assert split(folder, f"tokens:{folder}") == [["0.npy", "1.bin"], [], []]
    (folder / "0.npy").unlink()
    (folder / "1.bin").unlink()
    with pytest.raises(UserError, match="train.bin is missing, and there are no other files in"):
        open_source(f"tokens:{folder}")
