"""The TFDS data set of packed rows, written and read as array_record without TensorFlow.

A record is a block of rows. Reading a record costs about 70 microseconds whatever its size, so
blocks bring a corpus of ten megabytes into memory in a tenth of a second, where one row a record
takes seconds. Blocks are still small enough for random access to corpora that do not fit in memory.

TFDS's own writer keeps up to 1 GB in memory and shows no progress, so the shards are written here,
one after the other, and TFDS's metadata at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from qkvjax.progress import Progress

BLOCK_ROWS = 32
NAME = "packed_tokens"
VERSION = "1.0.0"
_SHARD_BYTES = 256 << 20  # of ids
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def write(
    folder: Path,
    split: str,
    blocks: Iterable[np.ndarray],
    num_rows: int,
    width: int,
    dtype,
    progress: Progress,
) -> dict:
    """Writes the shards of a split below `folder`; existing shards are left as they are.

    Args:
      blocks: arrays [BLOCK_ROWS, width], the last one smaller.
      num_rows: of all blocks together, at least 1.
      width: T + 1.
      dtype: of the ids on disk, uint16 or int32.

    Returns:
      What `write_metadata` takes: {"name", "shard_lengths", "num_bytes"}.

    Raises:
      ValueError: the blocks do not have num_rows rows.
    """
    version_folder = _version_folder(folder)
    version_folder.mkdir(parents=True, exist_ok=True)
    features = _features(width, dtype)
    row_bytes = width * np.dtype(dtype).itemsize
    shard_blocks = max(1, _SHARD_BYTES // (row_bytes * BLOCK_ROWS))
    num_blocks = -(-num_rows // BLOCK_ROWS)
    num_shards = -(-num_blocks // shard_blocks)
    blocks = iter(blocks)
    lengths = []
    num_bytes = 0
    for shard in range(num_shards):
        file = version_folder / f"{NAME}-{split}.array_record-{shard:05d}-of-{num_shards:05d}"
        unfinished = file.with_name(f"unfinished-{split}")
        is_finished = file.is_file()
        writer = None if is_finished else ArrayRecordWriter(str(unfinished), "group_size:1")
        count = 0
        for block in itertools.islice(blocks, shard_blocks):
            block_bytes = block.shape[0] * row_bytes
            progress.add(block_bytes / 1e6, skipped=is_finished)
            num_bytes += block_bytes
            count += 1
            if writer is not None:
                writer.write(features.serialize_example({"tokens": block.astype(dtype)}))
        if writer is not None:
            writer.close()
            unfinished.rename(file)
        lengths.append(count)
    if sum(lengths) != num_blocks or next(blocks, None) is not None:
        raise ValueError(f"the blocks of {split} do not have {num_rows} rows")
    return {"name": split, "shard_lengths": lengths, "num_bytes": num_bytes}


def write_metadata(folder: Path, splits: Iterable[Mapping], width: int, dtype) -> None:
    """Writes the metadata that make the shards of all splits one TFDS data set.

    Args:
      splits: what `write` returned for each.
      width: T + 1.
      dtype: of the ids on disk.
    """
    version_folder = _version_folder(folder)
    template = tfds.core.ShardedFileTemplate(
        data_dir=version_folder,
        template=_TEMPLATE,
        dataset_name=NAME,
        filetype_suffix="array_record",
    )
    infos = [
        tfds.core.SplitInfo(
            name=split["name"],
            shard_lengths=split["shard_lengths"],
            num_bytes=split["num_bytes"],
            filename_template=template.replace(split=split["name"]),
        )
        for split in splits
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=version_folder,
        features=_features(width, dtype),
        split_infos=infos,
        version=VERSION,
        filename_template=template,
        check_data=False,
        description="Token ids packed into rows of one length.",
        disable_shuffling=True,
    )


def read(folder: Path, split: str):
    """Returns the data source of a written split; [i]["tokens"] is block i, [rows, T + 1]."""
    (version,) = (folder / NAME).iterdir()
    return tfds.builder_from_directory(version).as_data_source(split)


def _version_folder(folder: Path) -> Path:
    return folder / NAME / VERSION


def _features(width: int, dtype) -> tfds.features.FeaturesDict:
    # Ids are stored as raw bytes, which are faster to write and to read than a list of integers.
    shape = (None, width)
    tokens = tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype).type, encoding="bytes")
    return tfds.features.FeaturesDict({"tokens": tokens})
