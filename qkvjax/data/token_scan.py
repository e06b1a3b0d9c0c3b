"""Reads all ids of token files once, for their digest, special tokens and documents."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from qkvjax.data.sources import TokenFiles
from qkvjax.data.store import damaged, find_or_make
from qkvjax.data.token_ids import Ids
from qkvjax.data.tokenizers import Tokenizer
from qkvjax.errors import UserError

_BLOCK = 1 << 22  # ids read at once
_FORMAT = 2  # of a stored scan; another number scans again
# Names of special tokens that stand between documents, reduced to their letters.
_BETWEEN_DOCUMENTS = re.compile(
    "s|[be]o[sd]|eot|sep|cls|pad|document"
    "|(begin|beginning|start|end)of(text|sentence|doc|document|sequence|stream|file)"
)


@dataclasses.dataclass(frozen=True)
class Scan:
    """The result of reading all ids once.

    Attributes:
      sha256: hexadecimal, over the ids of both splits.
      smallest, largest: id; at most 0 and at least 0.
      counts: special id -> how often it occurs.
      ends: special ids that stand between documents.
      strange: an id that stands for no bytes and is not special, or None.
      labels: split -> number of tokens that are scored.
    """

    sha256: str
    smallest: int
    largest: int
    counts: Mapping[int, int]
    ends: list[int]
    strange: int | None
    labels: Mapping[str, int]

    def check(self, source: str, tokenizer: Tokenizer) -> None:
        """Raises UserError if the ids are not the tokenizer's."""
        remedy = "set data.tokenizer to the one that wrote the file"
        if self.smallest < 0:
            raise UserError(f"data.source={source!r} holds the id {self.smallest:,}: {remedy}")
        if self.largest >= tokenizer.num_ids:
            raise UserError(
                f"data.source={source!r} holds the id {self.largest:,} and the tokenizer"
                f" {tokenizer.name} has {tokenizer.num_ids:,}: {remedy}"
            )
        if self.strange is not None:
            raise UserError(
                f"data.source={source!r} holds the id {self.strange:,}, which stands for no bytes"
                f" in the tokenizer {tokenizer.name}, so that bits per byte would be wrong:"
                f" {remedy}, which has to be a byte-level BPE"
            )


def load_or_scan(
    source: TokenFiles, tokenizer: Tokenizer, whole: bool, splits: Mapping[str, Ids]
) -> tuple[Scan, dict[str, np.ndarray]]:
    """Loads the scan of token files from the data folder; scans them if it is not there.

    Returns:
      (scan, split -> spans), spans int64 [documents, 2] as `document_spans` has them.
    """
    key = json.dumps([_FORMAT, source.key(), tokenizer.fingerprint, whole])

    def make(folder: Path) -> None:
        scan, spans = _scan(tokenizer, splits)
        for split, array in spans.items():
            np.save(folder / f"{split}.npy", array)
        (folder / "scan.json").write_text(json.dumps(dataclasses.asdict(scan)))

    folder = find_or_make(f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}", make)
    try:
        scan = _load(folder / "scan.json")
        spans = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in splits}
    except (OSError, ValueError, EOFError, TypeError, KeyError) as error:
        raise damaged(folder, error) from None
    return scan, spans


def _load(path: Path) -> Scan:
    content = json.loads(path.read_text())
    types = {"sha256": str, "largest": int, "counts": dict, "ends": list, "labels": dict}
    for name, kind in types.items():
        if not isinstance(content[name], kind):
            raise TypeError(name)
    counts = {int(i): count for i, count in content.pop("counts").items()}  # JSON has text keys
    return Scan(counts=counts, **content)


def document_spans(tokens: np.ndarray, separator: int) -> np.ndarray:
    """Returns start and end of the non-empty stretches between separators.

    Args:
      tokens: [n].

    Returns:
      int64 [documents, 2].
    """
    return _spans_between(np.flatnonzero(tokens[:] == separator), len(tokens))


def _spans_between(separators: np.ndarray, length: int) -> np.ndarray:
    """Returns int64 [documents, 2]: the non-empty stretches between positions of separators."""
    edges = np.concatenate([[-1], separators, [length]]).astype(np.int64)
    spans = np.stack([edges[:-1] + 1, edges[1:]], axis=1)
    return spans[spans[:, 1] > spans[:, 0]]


class _IdsWithoutBytes:
    """The ids of one split that stand for no bytes: positions and values, both int64 [n]."""

    def __init__(self):
        self._positions = [np.empty(0, np.int64)]
        self._values = [np.empty(0, np.int64)]

    def add(self, positions: np.ndarray, values: np.ndarray) -> None:
        self._positions.append(positions)
        self._values.append(values)

    @property
    def positions(self) -> np.ndarray:
        return np.concatenate(self._positions)

    @property
    def values(self) -> np.ndarray:
        return np.concatenate(self._values)


def _scan(tokenizer: Tokenizer, splits: Mapping[str, Ids]) -> tuple[Scan, dict[str, np.ndarray]]:
    """Reads all ids once; returns (scan, split -> spans)."""
    has_no_bytes = tokenizer.num_bytes == 0
    special = tokenizer.special | {tokenizer.separator: "separator"}
    # The sha256 is of ids in the width that the vocabulary needs, whatever the file stores; only
    # 16-bit ids of a larger vocabulary are hashed as they are.
    digest_dtype = "<u2" if tokenizer.num_ids <= 2**16 else "<u4"
    digest = hashlib.sha256()
    smallest = 0
    largest = 0
    strange = None
    without_bytes = {split: _IdsWithoutBytes() for split in splits}
    for split, ids in splits.items():
        digest.update(f"{split} {len(ids)} ".encode())
        for start in range(0, len(ids), _BLOCK):
            block = ids[start : start + _BLOCK]
            of_digest = block if block.dtype == "<u2" else block.astype(digest_dtype)
            digest.update(of_digest.tobytes())
            smallest = min(smallest, int(block.min()))
            largest = max(largest, int(block.max()))
            if smallest < 0 or largest >= tokenizer.num_ids or strange is not None:
                continue  # the file will be refused
            offsets = np.flatnonzero(has_no_bytes[block])
            values = block[offsets].astype(np.int64)
            strange = _first_outside(np.unique(values), special)
            without_bytes[split].add(start + offsets, values)
    counts = _counts(ids.values for ids in without_bytes.values())
    ends = [] if strange is not None else _document_ends(counts, special, tokenizer.separator)
    spans = {}
    labels = {}
    for split, ids in splits.items():
        is_end = np.isin(without_bytes[split].values, ends)
        spans[split] = _spans_between(without_bytes[split].positions[is_end], len(ids))
        num_tokens = int((spans[split][:, 1] - spans[split][:, 0]).sum())
        labels[split] = num_tokens - int((~is_end).sum())
    scan = Scan(
        sha256=digest.hexdigest(),
        smallest=smallest,
        largest=largest,
        counts=counts,
        ends=ends,
        strange=strange,
        labels=labels,
    )
    return scan, spans


def _first_outside(ids: np.ndarray, special: Mapping[int, str]) -> int | None:
    """Returns the first of the ids that is not special, None if all are."""
    return next((int(i) for i in ids if int(i) not in special), None)


def _counts(arrays: Iterable[np.ndarray]) -> dict[int, int]:
    """Returns id -> how often it occurs."""
    values, counts = np.unique(np.concatenate(list(arrays)), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _document_ends(
    counts: Mapping[int, int], special: Mapping[int, str], separator: int
) -> list[int]:
    """Returns the special ids in the files that stand between documents.

    These are the tokenizer's separator and the special tokens whose name says that a text begins
    or ends. If there are none, every special token is one, so that none of them is scored.
    """
    ends = [
        i
        for i in counts
        if i == separator or _BETWEEN_DOCUMENTS.fullmatch(re.sub("[^a-z]", "", special[i].lower()))
    ]
    return ends or list(counts)
