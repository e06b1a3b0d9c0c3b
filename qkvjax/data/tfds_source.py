"""Documents of a TFDS data set that is prepared already, read without TensorFlow.

TFDS needs TensorFlow to prepare its own data sets and none to read what was written as
array_record. Nothing is downloaded here: a data set that is not there is told at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from qkvjax.errors import UserError, did_you_mean

_BLOCK = 1024  # records of a read


def open_prepared(name: str, split: str) -> tuple[tuple[Path, ...], Callable[[], Iterator[bytes]]]:
    """The files and the reader of `tfds:NAME` or `tfds:NAME#SPLIT`.

    Args:
      name: data set, data set/config, either with a version behind a slash.
      split: a TFDS split, "train" or "test[:10%]".

    Returns:
      (files, function that yields the documents).

    Raises:
      UserError: nothing prepared (found out without importing TFDS), another file format, an
        unknown split, or no single Text feature.
    """
    folder, splits = _find(name)
    if re.match(r"\w*", split)[0] not in splits:
        raise UserError(
            f"tfds:{name} has the splits {', '.join(splits)}, not {split!r}: name one as"
            f" tfds:{name}#SPLIT{did_you_mean(split, splits)}"
        )
    return tuple(sorted(folder.iterdir())), lambda: _read(folder, name, split)


def read_images(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(images [n, height, width, channels], labels [n]) of train, and of test or validation.

    Raises:
      UserError: nothing prepared, no such splits, no image and label, or images of several sizes.
    """
    import tensorflow_datasets as tfds

    folder, splits = _find(name)
    held_out = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or held_out is None:
        there = ", ".join(splits)
        raise UserError(f"tfds:{name} has the splits {there}: train and test are needed")
    builder = tfds.builder_from_directory(folder)
    if not {"image", "label"} <= set(builder.info.features):
        there = ", ".join(builder.info.features)
        raise UserError(f"tfds:{name} has the features {there}: image and label are needed")
    found = []
    for split in ("train", held_out):
        records = builder.as_data_source(split)
        try:
            images = np.stack([records[i]["image"] for i in range(len(records))])
        except ImportError:
            raise UserError("images of TFDS need Pillow: pip install 'qkvjax[vision]'") from None
        except ValueError:
            raise UserError(f"tfds:{name} has images of several sizes: resize them") from None
        found.append((images, np.array([records[i]["label"] for i in range(len(records))])))
    return found


def _find(name: str) -> tuple[Path, list[str]]:
    """The folder of a prepared data set that can be read here, and its splits."""
    where = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        root = Path(where).expanduser()
    except RuntimeError:
        raise UserError(
            f"tfds:{name} is looked for in {where}, and there is no home folder (HOME is unset,"
            " and the system does not know the user): set TFDS_DATA_DIR"
        ) from None
    folder = _newest(root, name)
    info = json.loads((folder / "dataset_info.json").read_text())
    if info.get("fileFormat") != "array_record":
        raise UserError(
            f"{folder} is {info.get('fileFormat', 'tfrecord')}, which needs TensorFlow to read:"
            f" {_prepare(name)}"
        )
    return folder, [item["name"] for item in info.get("splits", ())]


def _newest(root, name):
    """The folder of the newest version of a data set with one config, or whose config is named."""
    found = {path.parent for path in (root / name).glob("**/dataset_info.json")}
    if not found:
        raise UserError(
            f"tfds:{name} is not prepared in {root} (TFDS_DATA_DIR), and nothing is downloaded"
            f" here: {_prepare(name)}"
        )
    configs = {folder.parent for folder in found}
    if len(configs) > 1 and root / name not in found:
        names = ", ".join(sorted(f"tfds:{c.relative_to(root).as_posix()}" for c in configs))
        raise UserError(f"tfds:{name} has several configs here: use one of {names}")
    return max(found, key=lambda folder: [int(n) for n in re.findall(r"\d+", folder.name)])


def _prepare(name):
    return (
        "prepare it where TensorFlow is (pip install tensorflow-cpu), once: python -c 'import"
        f' tensorflow_datasets as tfds; tfds.builder("{name}", file_format="array_record")'
        ".download_and_prepare()'; then copy the folder or set TFDS_DATA_DIR"
    )


def _read(folder, name, split):
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
        raise UserError(f"tfds:{name}#{split} is no split ({error}): write train[:10%]") from None
    for start in range(0, len(records), _BLOCK):
        block = records.__getitems__(range(start, min(start + _BLOCK, len(records))))
        for record in block:
            value = record[key]
            yield value if isinstance(value, bytes) else str(value).encode()
