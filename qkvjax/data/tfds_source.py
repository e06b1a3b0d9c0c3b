"""TFDS data sets that were prepared earlier, read without TensorFlow.

TFDS needs TensorFlow to prepare its own data sets, but not to read what was written as
array_record. Nothing is downloaded here: a data set that is not prepared is refused at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from qkvjax.errors import UserError, did_you_mean

_BLOCK = 1024  # records read at once


def open_prepared(name: str, split: str) -> tuple[tuple[Path, ...], Callable[[], Iterator[bytes]]]:
    """Returns the files and the reader of `tfds:NAME` or `tfds:NAME#SPLIT`.

    Args:
      name: data set or data set/config, each with or without /version.
      split: a TFDS split, as "train" or "test[:10%]".

    Returns:
      (files, function that yields the documents).

    Raises:
      UserError: the data set is not prepared (found out without importing TFDS), another file
        format, an unknown split, or more than one Text feature and none named "text".
    """
    folder, splits = _find(name)
    split_name = re.match(r"\w*", split)[0]
    if split_name not in splits:
        raise UserError(
            f"tfds:{name} has the splits {', '.join(splits)}, not {split!r}: name one as"
            f" tfds:{name}#SPLIT{did_you_mean(split, splits)}"
        )
    return tuple(sorted(folder.iterdir())), lambda: _read_texts(folder, name, split)


def read_images(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Reads (images [n, height, width, channels], labels [n]) of train, and of test or validation.

    Raises:
      UserError: the data set is not prepared, has no such splits, no image and label, or images
        of several sizes.
    """
    import tensorflow_datasets as tfds

    folder, splits = _find(name)
    held_out = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or held_out is None:
        raise UserError(
            f"tfds:{name} has the splits {', '.join(splits)}: train and test are needed"
        )
    builder = tfds.builder_from_directory(folder)
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise UserError(
            f"tfds:{name} has the features {', '.join(features)}: image and label are needed"
        )
    return [_read_labelled(name, builder.as_data_source(split)) for split in ("train", held_out)]


def _read_labelled(name: str, records) -> tuple[np.ndarray, np.ndarray]:
    try:
        images = np.stack([records[i]["image"] for i in range(len(records))])
    except ImportError:
        raise UserError("images of TFDS need Pillow: pip install 'qkvjax[vision]'") from None
    except ValueError:
        raise UserError(f"tfds:{name} has images of several sizes: resize them") from None
    labels = np.array([records[i]["label"] for i in range(len(records))])
    return images, labels


def _find(name: str) -> tuple[Path, list[str]]:
    """Returns the folder of a prepared data set that can be read here, and its splits."""
    root_name = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        root = Path(root_name).expanduser()
    except RuntimeError:
        raise UserError(
            f"tfds:{name} is expected in {root_name}, and there is no home folder (HOME is unset,"
            " and the system does not know the user): set TFDS_DATA_DIR"
        ) from None
    folder = _newest_version(root, name)
    info = json.loads((folder / "dataset_info.json").read_text())
    if info.get("fileFormat") != "array_record":
        raise UserError(
            f"{folder} is {info.get('fileFormat', 'tfrecord')}, which needs TensorFlow to read:"
            f" {_how_to_prepare(name)}"
        )
    return folder, [item["name"] for item in info.get("splits", ())]


def _newest_version(root: Path, name: str) -> Path:
    """Returns the folder of the newest version.

    Raises:
      UserError: no version is prepared, or there are several configs and `name` has none.
    """
    versions = {path.parent for path in (root / name).glob("**/dataset_info.json")}
    if not versions:
        raise UserError(
            f"tfds:{name} is not prepared in {root} (TFDS_DATA_DIR), and nothing is downloaded"
            f" here: {_how_to_prepare(name)}"
        )
    configs = {folder.parent for folder in versions}
    if len(configs) > 1 and root / name not in versions:
        names = ", ".join(sorted(f"tfds:{c.relative_to(root).as_posix()}" for c in configs))
        raise UserError(f"tfds:{name} has several configs here: use one of {names}")
    return max(versions, key=lambda folder: [int(n) for n in re.findall(r"\d+", folder.name)])


def _how_to_prepare(name: str) -> str:
    return (
        "prepare it where TensorFlow is (pip install tensorflow-cpu), once: python -c 'import"
        f' tensorflow_datasets as tfds; tfds.builder("{name}", file_format="array_record")'
        ".download_and_prepare()'; then copy the folder or set TFDS_DATA_DIR"
    )


def _read_texts(folder: Path, name: str, split: str) -> Iterator[bytes]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    features = builder.info.features
    texts = [key for key, value in features.items() if isinstance(value, tfds.features.Text)]
    if "text" not in texts and len(texts) != 1:
        raise UserError(
            f"tfds:{name} has no Text feature 'text' and {len(texts)} others"
            f" ({', '.join(features)}): save its text as jsonl and use jsonl:PATH#FIELD"
        )
    key = "text" if "text" in texts else texts[0]
    try:
        records = builder.as_data_source(split)
    except ValueError as error:
        raise UserError(
            f"tfds:{name}#{split} is not a split ({error}): write train[:10%]"
        ) from None
    for start in range(0, len(records), _BLOCK):
        block = records.__getitems__(range(start, min(start + _BLOCK, len(records))))
        for record in block:
            value = record[key]
            yield value if isinstance(value, bytes) else str(value).encode()
