"""`parquet:` and `arrow:`: one document for each row, from one column."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from qkvjax.data.files import expanded, find
from qkvjax.data.formats import format_of, wrong_format
from qkvjax.data.jsonl import as_bytes
from qkvjax.errors import UserError, did_you_mean

_BATCH = 1024  # rows that are read at once


@dataclasses.dataclass(frozen=True)
class _Table:
    """An open file of rows.

    Attributes:
      columns: names of the columns.
      batches: takes the name of a column and yields pyarrow arrays of its values.
    """

    columns: list[str]
    batches: Callable[[str], Iterator]


def open_tables(name: str, kind: str, path: str, column: str) -> tuple[Path, ...]:
    """Finds the files of `parquet:PATH` or `arrow:PATH` and checks that they have the column.

    `arrow:` takes files of the IPC format and of its stream format, and folders that
    `datasets.save_to_disk` wrote.

    Raises:
      UserError: nothing is there, another format, no such column.
    """
    files = _files_of_saved_data_set(expanded(path)) if kind == "arrow" else ()
    if not files:
        files = find(name, path, (f".{kind}",))
    for file in files:
        with _open_table(kind, file) as table:
            columns = table.columns
        if column not in columns:
            raise UserError(
                f"{file} has no column {column!r} among {', '.join(columns)}; name the column with"
                f" the text as {kind}:PATH#COLUMN{did_you_mean(column, columns)}"
            )
    return files


def read_tables(kind: str, files: tuple[Path, ...], column: str) -> Iterator[bytes | None]:
    """Reads the documents; None for a row whose text is null.

    Raises:
      UserError: a column that is not text, or a damaged file.
    """
    import pyarrow

    for file in files:
        with _open_table(kind, file) as table:
            try:
                for values in table.batches(column):
                    yield from map(as_bytes, values.to_pylist())
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file}: column {column!r} is not UTF-8 ({error}): write it again"
                ) from None
            except TypeError as error:
                raise UserError(
                    f"{file}: column {column!r} is not text ({error}); name another column as"
                    f" {kind}:PATH#COLUMN"
                ) from None
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{file} is damaged ({error}): copy it again") from None


@contextlib.contextmanager
def _open_table(kind: str, file: Path) -> Iterator[_Table]:
    """Opens a file; kind is "parquet" or "arrow".

    Raises:
      UserError: the file is damaged or of another format.
    """
    import pyarrow

    open_kind = _open_parquet if kind == "parquet" else _open_arrow
    try:
        with open_kind(file) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise _not_a_table(kind, file, error) from None


def _not_a_table(kind: str, file: Path, error: Exception) -> UserError:
    """Returns the error about a file that pyarrow cannot open."""
    a_file = "a parquet file" if kind == "parquet" else "an Arrow file"
    form = format_of(file)
    if form.is_text:
        return UserError(
            f"{file} is not {a_file} but {form.name}: use jsonl:{file}#FIELD or text:{file}"
        )
    if form.evidence == "content" or f"use {kind}:" in form.remedy:
        return UserError(f"{file} is not {a_file}, or is damaged ({error}): copy it again")
    return wrong_format(file, form, f"{kind}: takes {a_file}")


@contextlib.contextmanager
def _open_parquet(file: Path) -> Iterator[_Table]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:

        def batches(column):
            for batch in parquet.iter_batches(batch_size=_BATCH, columns=[column]):
                yield batch.column(0)

        yield _Table(parquet.schema_arrow.names, batches)


@contextlib.contextmanager
def _open_arrow(file: Path) -> Iterator[_Table]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as mapped:
        is_file_format = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        if is_file_format:
            reader = pyarrow.ipc.open_file(mapped)
            record_batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            reader = pyarrow.ipc.open_stream(mapped)
            record_batches = iter(reader)

        def batches(column):
            index = reader.schema.get_field_index(column)
            for record_batch in record_batches:
                values = record_batch.column(index)
                for start in range(0, len(values), _BATCH):
                    yield values.slice(start, _BATCH)

        yield _Table(reader.schema.names, batches)


def _files_of_saved_data_set(folder: Path) -> tuple[Path, ...]:
    """Returns the files of a folder that `datasets.save_to_disk` wrote, () for another folder.

    Raises:
      UserError: it holds several splits, or lacks one of its files.
    """
    if (folder / "dataset_dict.json").is_file():
        names = (f"arrow:{state.parent}" for state in sorted(folder.glob("*/state.json")))
        raise UserError(f"{folder} holds several splits: name one, {' or '.join(names)}")
    state = folder / "state.json"
    if not state.is_file():
        return ()
    try:
        items = json.loads(state.read_text())["_data_files"]
        files = tuple(folder / item["filename"] for item in items)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{state} does not list the data set's files ({error!r}): copy the folder again"
        ) from None
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, and {state} lists it: copy the folder again")
    return files
