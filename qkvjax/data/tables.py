"""`parquet:` and `arrow:`: a document a row of one column."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from qkvjax.data.files import expanded, find
from qkvjax.data.formats import look, refusal
from qkvjax.data.jsonl import as_bytes
from qkvjax.errors import UserError, did_you_mean

_BATCH = 1024  # rows that are read at once
_IS = {"parquet": "a parquet file", "arrow": "an Arrow file"}


def open_tables(name: str, kind: str, path: str, column: str) -> tuple[Path, ...]:
    """Finds the files of `parquet:PATH` or `arrow:PATH` and checks that they have the column.

    `arrow:` takes files of the IPC format and of its stream format, and folders that
    `datasets.save_to_disk` wrote.

    Raises:
      UserError: nothing is there, another format, no such column.
    """
    files = _saved_data_set(expanded(path)) if kind == "arrow" else ()
    files = files or find(name, path, (f".{kind}",))
    for file in files:
        with _opened(kind, file) as (names, _):
            pass
        if column not in names:
            raise UserError(
                f"{file} has no column {column!r} among {', '.join(names)}; name the column with"
                f" the text as {kind}:PATH#COLUMN{did_you_mean(column, names)}"
            )
    return files


def read_tables(kind: str, files: tuple[Path, ...], column: str) -> Iterator[bytes | None]:
    """Reads the documents; None for a row whose text is null.

    Raises:
      UserError: a column that is no text, or a damaged file.
    """
    import pyarrow

    for file in files:
        with _opened(kind, file) as (_, batches):
            try:
                for values in batches(column):
                    yield from map(as_bytes, values.to_pylist())
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file}: column {column!r} is not UTF-8 ({error}): write it again"
                ) from None
            except TypeError as error:
                raise UserError(
                    f"{file}: column {column!r} is no text ({error}); name another column as"
                    f" {kind}:PATH#COLUMN"
                ) from None
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{file} is damaged ({error}): copy it again") from None


@contextlib.contextmanager
def _opened(kind, file):
    """(names of the columns, function that gives batches of a column's values)."""
    import pyarrow

    try:
        with (_parquet if kind == "parquet" else _arrow)(file) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        found = look(file)
        if found.is_text:
            use = f"use jsonl:{file}#FIELD or text:{file}"
            raise UserError(f"{file} is no {kind} file but {found.name}: {use}") from None
        if found.evidence == "content" or f"use {kind}:" in found.remedy:
            raise UserError(
                f"{file} is no {kind} file, or damaged ({error}): copy it again"
            ) from None
        raise refusal(file, found, f"{kind}: takes {_IS[kind]}") from None


@contextlib.contextmanager
def _parquet(file):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:

        def batches(column):
            for batch in table.iter_batches(batch_size=_BATCH, columns=[column]):
                yield batch.column(0)

        yield table.schema_arrow.names, batches


@contextlib.contextmanager
def _arrow(file):
    import pyarrow

    with pyarrow.memory_map(str(file)) as mapped:
        if mapped.read(6) == b"ARROW1":
            mapped.seek(0)
            reader = pyarrow.ipc.open_file(mapped)
            parts = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            mapped.seek(0)
            reader = parts = pyarrow.ipc.open_stream(mapped)

        def batches(column):
            for part in parts:
                values = part.column(reader.schema.get_field_index(column))
                for start in range(0, len(values), _BATCH):
                    yield values.slice(start, _BATCH)

        yield reader.schema.names, batches


def _saved_data_set(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that `datasets.save_to_disk` wrote, () of any other folder.

    Raises:
      UserError: it holds several splits.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = (f"arrow:{state.parent}" for state in sorted(folder.glob("*/state.json")))
        raise UserError(f"{folder} holds several splits: name one, {' or '.join(names)}")
    state = folder / "state.json"
    if not state.is_file():
        return ()
    try:
        listed = json.loads(state.read_text())["_data_files"]
        files = tuple(folder / item["filename"] for item in listed)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{state} does not list the data set's files ({error!r}): copy the folder again"
        ) from None
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, and {state} lists it: copy the folder again")
    return files
