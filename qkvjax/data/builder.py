"""The TFDS data set of packed rows, written and read as array_record without TensorFlow.

A record is a block of rows. Reading a record costs about 70 microseconds whatever it holds, so
blocks bring a corpus of ten megabytes into memory in a tenth of a second, where one row a
record takes seconds; they stay small enough for random access to corpora that do not fit.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

BLOCK_ROWS = 32

Rows = Callable[[], Iterator[np.ndarray]]


class PackedTokens(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Blocks of up to 32 rows of T + 1 ids, in the order in which the rows are given.

    Ids are kept as raw bytes, which is quicker both ways than a list of integers.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, rows: Mapping[str, Rows], width: int, dtype, **kwargs):
        self._rows, self._width, self._dtype = rows, width, dtype
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        shape = (None, self._width)
        tokens = tfds.features.Tensor(shape=shape, dtype=self._dtype, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self, description="Token ids packed into rows of one length.",
            features=tfds.features.FeaturesDict({"tokens": tokens}), disable_shuffling=True,
        )  # fmt: skip

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(rows) for split, rows in self._rows.items()}

    def _generate_examples(self, rows):
        rows = rows()
        for index in itertools.count():
            block = list(itertools.islice(rows, BLOCK_ROWS))
            if not block:
                return
            yield index, {"tokens": np.stack(block).astype(self._dtype)}


def write(folder: Path, rows: Mapping[str, Rows], width: int, num_ids: int) -> None:
    """Prepares the splits of `rows` below `folder`; what the generators raise comes through.

    Args:
      rows: split -> function that yields int arrays [width], at least one.
      width: T + 1.
      num_ids: ids of the tokenizer; up to 65,536 are kept as uint16.
    """
    dtype = np.uint16 if num_ids <= 2**16 else np.int32
    tfds.disable_progress_bar()
    builder = PackedTokens(rows, width, dtype, data_dir=folder)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints where it writes
        builder.download_and_prepare()
    shutil.rmtree(folder / "downloads", ignore_errors=True)


def read(folder: Path, split: str):
    """The data source of a split that `write` prepared; [i]["tokens"] is block i, [rows, T + 1]."""
    (version,) = (folder / PackedTokens.name).iterdir()
    return tfds.builder_from_directory(version).as_data_source(split)
