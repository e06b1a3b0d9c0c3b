"""`arrow:`, and the errors of `parquet:` about other files."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from qkvjax.data.sources import open_source
from qkvjax.errors import UserError

TABLE = pyarrow.table({"text": ["é", None, "b"], "n": [1, 2, 3]})
TEXTS = ["é".encode(), b"b"]


def read(source):
    return list(open_source(source).documents())


def write(path, make, table=TABLE):
    with pyarrow.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("make", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_arrow_files(tmp_path, make):
    file = tmp_path / "a.arrow"
    write(file, make)
    source = open_source(f"arrow:{file}")
    assert list(source.documents()) == TEXTS and source.skipped == ["1 null"]
    assert read(f"arrow:{tmp_path}#text") == TEXTS
    with pytest.raises(UserError, match="no column 'txt'.*arrow:PATH#COLUMN.*did you mean 'text'"):
        open_source(f"arrow:{file}#txt")
    with pytest.raises(UserError, match="column 'n' is not text"):
        read(f"arrow:{file}#n")
    with pytest.raises(UserError, match="is an Arrow (file|stream).*use arrow:.*#COLUMN"):
        open_source(f"text:{file}")
    with pytest.raises(UserError, match="is an Arrow (file|stream).*use arrow:"):
        open_source(f"parquet:{file}")
    file.write_bytes(file.read_bytes()[:-80])
    with pytest.raises(UserError, match="a.arrow is (not an Arrow file, or is )?damaged"):
        read(f"arrow:{file}")


@pytest.mark.parametrize("type", ["large_string", "binary", "dictionary"])
def test_columns_of_other_types_of_text(tmp_path, type):
    column = TABLE["text"]
    if type == "dictionary":
        column = column.dictionary_encode()
    else:
        column = column.cast(getattr(pyarrow, type)())
    table = pyarrow.table({"text": column})
    write(tmp_path / "a.arrow", pyarrow.ipc.new_stream, table)
    assert read(f"arrow:{tmp_path}/a.arrow") == TEXTS


def saved(folder, name="data-00000-of-00001.arrow"):
    """A folder as datasets.save_to_disk writes it."""
    folder.mkdir()
    write(folder / name, pyarrow.ipc.new_stream)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_data_set(tmp_path):
    saved(tmp_path / "one")
    write(tmp_path / "one" / "cache-0123.arrow", pyarrow.ipc.new_stream)  # of a map
    assert read(f"arrow:{tmp_path}/one") == TEXTS
    with pytest.raises(UserError, match="is an Arrow stream.*use arrow:"):
        open_source(f"text:{tmp_path}/one")
    (tmp_path / "one" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match="of-00001.arrow is missing, and .*state.json lists it"):
        open_source(f"arrow:{tmp_path}/one")


def test_a_saved_data_set_of_several_splits(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    saved(tmp_path / "train")
    saved(tmp_path / "test")
    with pytest.raises(
        UserError, match="several splits: name one, arrow:.*/test or arrow:.*/train"
    ):
        open_source(f"arrow:{tmp_path}")
    assert read(f"arrow:{tmp_path}/train") == TEXTS


def test_other_files_for_tables(tmp_path):
    file = tmp_path / "file"
    pyarrow.parquet.write_table(TABLE, file)
    with pytest.raises(UserError, match="is a parquet file.*use parquet:"):
        open_source(f"arrow:{file}")
    file.write_text('{"text": "a"}\n')
    for kind, a_file in (("arrow", "an Arrow file"), ("parquet", "a parquet file")):
        with pytest.raises(UserError, match=f"is not {a_file} but UTF-8 text: use jsonl:"):
            open_source(f"{kind}:{file}")
    file.write_bytes(b"PAR1\x15" + bytes(99))
    with pytest.raises(UserError, match="is not a parquet file, or is damaged.*copy it again"):
        open_source(f"parquet:{file}")
