"""`jsonl:` on files as people have them."""

import gzip
import json

import pytest

from qkvjax.data.dataset import prepare
from qkvjax.data.sources import open_source
from qkvjax.errors import UserError

ROWS = [{"text": f"é {i}", "n": i} for i in range(40)]
TEXTS = [row["text"].encode() for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(source):
    return list(open_source(source).documents())


def test_compressed_lines(tmp_path):
    import pyarrow

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    with pyarrow.CompressedOutputStream(str(tmp_path / "b.jsonl.zst"), "zstd") as file:
        file.write(LINES.encode())
    assert read(f"jsonl:{tmp_path}/a.jsonl.gz") == read(f"jsonl:{tmp_path}/b.jsonl.zst") == TEXTS
    assert read(f"jsonl:{tmp_path}") == TEXTS * 2


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path, indent):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(ROWS, indent=indent))
    assert read(f"jsonl:{file}") == read(f"jsonl:{tmp_path}") == TEXTS
    file.write_text(json.dumps(ROWS, indent=indent)[:-9])
    with pytest.raises(UserError, match="a.json, item 40: not JSON"):
        read(f"jsonl:{file}")
    file.write_text(json.dumps(["a", "b"], indent=indent))
    with pytest.raises(UserError, match="a.json, item 1: no field 'text'"):
        read(f"jsonl:{file}")


def test_lines_are_preferred_to_json_beside_them(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "about.json").write_text('{"version": 1}')
    assert read(f"jsonl:{tmp_path}") == TEXTS


def test_nulls_are_skipped_and_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": null}\n' + LINES + '{"text": ""}\n{"text": null}\n')
    for _ in range(2):  # the count is kept with the prepared copy
        lines = []
        data = prepare(f"jsonl:{file}", "bytes", 8, log=lines.append)
        assert data.num_documents == 40
        assert "1 file, 40 documents (1 empty, 2 null skipped)" in lines[-1]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_lines_of_other_encodings(tmp_path, encoding):
    file = tmp_path / "a.jsonl"
    file.write_text(LINES, encoding=encoding)
    assert read(f"jsonl:{file}") == TEXTS


def test_the_field_is_behind_the_last_hash(tmp_path):
    file = tmp_path / "a#b.jsonl"
    file.write_text(LINES)
    assert read(f"jsonl:{file}") == read(f"jsonl:{file}#text") == read(f"jsonl:{file}#") == TEXTS
    assert read(f"jsonl:{tmp_path}/a#*.jsonl#text") == TEXTS
    (tmp_path / "a").mkdir()  # a path in front of the first #
    assert read(f"jsonl:{file}") == TEXTS
    with pytest.raises(UserError, match="no field 'body'"):
        read(f"jsonl:{file}#body")
    with pytest.raises(UserError, match="nothing is at .*/nowhere#a.jsonl"):
        read(f"jsonl:{tmp_path}/nowhere#a.jsonl#text")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"data": ROWS}, indent=2), "JSON over several lines.*jq -c '.FIELD"),
        (json.dumps({"data": ROWS}), "no field 'text' among data.*jq -c '.data"),
        ("\n".join(json.dumps(row, indent=1) for row in ROWS), "several lines.*jq -c . "),
        ("id,text\n1,a\n", "line 1: not JSON.*plain text is text:PATH"),
        ("\x89PNG\r\n\x1a\n", "is a PNG image, and jsonl: takes"),
        ("PAR1\x15\x04", "is a parquet file.*use parquet:.*#COLUMN"),
    ],
)
def test_files_that_are_not_lines_of_json(tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as refused:
        read(f"jsonl:{file}")
    assert "delete" not in str(refused.value)
