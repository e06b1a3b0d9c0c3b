"""`tokens:`: files of uint16 ids, mapped into memory as they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from qkvjax.data.sources import TokenFiles
from qkvjax.data.split import HELD_OUT
from qkvjax.data.store import damaged, find_or_make
from qkvjax.data.tokenizers import Tokenizer
from qkvjax.errors import UserError

_BLOCK = 1 << 24  # ids read at once


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The ids of one split and where its documents lie.

    Attributes:
      tokens: uint16 [n], a memory map.
      spans: int64 [documents, 2], start and end of each, without separators; those without a
        token are left out. What stands before the first separator is a document too.
    """

    tokens: np.ndarray
    spans: np.ndarray


def open_tokens(
    source: TokenFiles, tokenizer: Tokenizer, whole: bool
) -> tuple[dict[str, TokenStream], str]:
    """The splits of token files, and the sha256 of their content.

    One file holds its last tenth out; a folder's val.bin is what is held out. With `whole` all
    of one file is "validation". The first time the files are read once, to find the documents;
    the result is kept in the data folder.

    Raises:
      UserError: an empty file, one that is no uint16, ids beyond the tokenizer's.
    """
    train = _map(source.train)
    if source.validation:
        if whole:
            raise UserError(
                f"data.source={source.name!r} has two files and evaluate scores one: write"
                f" tokens:{source.validation}"
            )
        parts = {"train": train, "validation": _map(source.validation)}
    else:
        cut = 0 if whole else len(train) * (HELD_OUT - 1) // HELD_OUT
        parts = {"train": train[:cut], "validation": train[cut:]}
    key = json.dumps([source.key(), tokenizer.separator, whole])

    def make(folder):
        digest, largest = hashlib.sha256(), 0
        for split, tokens in parts.items():
            digest.update(f"{split} {len(tokens)} ".encode())
            for start in range(0, len(tokens), _BLOCK):
                block = tokens[start : start + _BLOCK]
                digest.update(block.tobytes())
                largest = max(largest, int(block.max()))
            np.save(folder / f"{split}.npy", document_spans(tokens, tokenizer.separator))
        scan = {"sha256": digest.hexdigest(), "largest": largest}
        (folder / "scan.json").write_text(json.dumps(scan))

    folder = find_or_make(f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}", make)
    try:
        scan = json.loads((folder / "scan.json").read_text())
        largest, content = int(scan["largest"]), str(scan["sha256"])
        spans = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in parts}
    except (OSError, ValueError, EOFError, TypeError, KeyError) as error:
        raise damaged(folder, error) from None
    if largest >= tokenizer.num_ids:
        raise UserError(
            f"data.source={source.name!r} holds the id {scan['largest']:,} and the tokenizer"
            f" {tokenizer.name} has {tokenizer.num_ids:,}: set data.tokenizer to the one that"
            " wrote the file"
        )
    return {split: TokenStream(parts[split], spans[split]) for split in parts}, content


def document_spans(tokens: np.ndarray, separator: int) -> np.ndarray:
    """int64 [documents, 2]: start and end of what stands between separators, where it is not empty.

    Args:
      tokens: [n], read in blocks.
    """
    places = [np.array([-1])]
    for start in range(0, len(tokens), _BLOCK):
        places.append(start + np.flatnonzero(tokens[start : start + _BLOCK] == separator))
    places.append(np.array([len(tokens)]))
    separators = np.concatenate(places)
    spans = np.stack([separators[:-1] + 1, separators[1:]], axis=1)
    return spans[spans[:, 1] > spans[:, 0]]


def _map(path: Path):
    size = path.stat().st_size
    if not size or size % 2:
        what = "is empty" if not size else f"has {size:,} bytes, an odd number"
        raise UserError(f"{path} {what}: tokens: takes uint16 ids, two bytes each")
    return np.memmap(path, "<u2", mode="r")
