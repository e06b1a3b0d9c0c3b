"""`tokens:`: files of token ids, mapped into memory as they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from qkvjax.data.sources import TokenFiles
from qkvjax.data.split import HELD_OUT
from qkvjax.data.store import damaged, find_or_make
from qkvjax.data.token_ids import Ids
from qkvjax.data.token_shards import open_shard
from qkvjax.data.token_widths import doubt, recognise
from qkvjax.data.tokenizers import Tokenizer
from qkvjax.errors import UserError

_BLOCK = 1 << 22  # ids read at once
_SCAN = 2  # what is kept of a scan; another number scans anew
# Names of special tokens that stand between documents, by their letters alone.
_BETWEEN = re.compile(
    "s|[be]o[sd]|eot|sep|cls|pad|document"
    "|(begin|beginning|start|end)of(text|sentence|doc|document|sequence|stream|file)"
)


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The ids of one split and where its documents lie.

    Attributes:
      tokens: [n] whole numbers, read by slices; the end of a document is the tokenizer's separator
        whichever special token the files have for it.
      spans: int64 [documents, 2], start and end of each, without separators; those without a
        token are left out. What stands before the first separator is a document too.
      num_labels: tokens of the documents that stand for text and are scored.
    """

    tokens: Ids
    spans: np.ndarray
    num_labels: int


def open_tokens(
    source: TokenFiles,
    tokenizer: Tokenizer,
    whole: bool,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, TokenStream], str]:
    """Opens the splits of token files.

    Files without their own validation hold the last tenth of the stream out. With `whole` all of
    it is "validation". The first time the files are read once, to find the documents; the result
    is kept in the data folder.

    Args:
      log: gets a line about files, documents and separators.

    Returns:
      (split -> stream, sha256 of the ids).

    Raises:
      UserError: an empty or truncated file, another format, ids that are not the tokenizer's.
    """
    files = source.train_files + source.validation_files
    _refuse_characters(files, tokenizer)
    shards = [open_shard(file, source.dtype) for file in files]
    for line in filter(None, map(doubt, shards if source.dtype else ())):
        log(f"data: warning: {line}")
    shards = recognise(shards, tokenizer.num_ids, source.name)
    number = len(source.train_files)
    train = Ids(shards[:number])
    if source.validation_files:
        if whole:
            count = "two" if len(files) == 2 else f"{len(files):,}"
            raise UserError(
                f"data.source={source.name!r} is {count} files in two splits, and evaluate scores"
                f" one of them: write tokens:{source.validation}"
            )
        parts = {"train": train, "validation": Ids(shards[number:])}
    else:
        cut = 0 if whole else len(train) * (HELD_OUT - 1) // HELD_OUT
        parts = {"train": train.part(0, cut), "validation": train.part(cut, len(train))}
    scan, spans = _scanned(source, tokenizer, whole, parts)
    _check(source, tokenizer, scan)
    ends = tuple(scan["ends"])
    streams = {
        split: TokenStream(
            ids.with_ends(ends, tokenizer.separator), spans[split], scan["labels"][split]
        )
        for split, ids in parts.items()
    }
    types = " and ".join(sorted({shard.dtype.name for shard in shards}))
    log(f"data: {source.name}: {_account(source, tokenizer, scan, streams, len(files), types)}")
    return streams, scan["sha256"]


def document_spans(tokens: np.ndarray, separator: int) -> np.ndarray:
    """Returns start and end of what stands between separators, where it is not empty.

    Args:
      tokens: [n].

    Returns:
      int64 [documents, 2].
    """
    return _between(np.flatnonzero(tokens[:] == separator), len(tokens))


def _between(separators, length):
    edges = np.concatenate([[-1], separators, [length]]).astype(np.int64)
    spans = np.stack([edges[:-1] + 1, edges[1:]], axis=1)
    return spans[spans[:, 1] > spans[:, 0]]


def _scanned(source, tokenizer, whole, parts):
    """(what a scan found, split -> spans), from the data folder where they are there."""
    key = json.dumps([_SCAN, source.key(), tokenizer.fingerprint, whole])

    def make(folder):
        scan, spans = _scan(tokenizer, parts)
        for split, found in spans.items():
            np.save(folder / f"{split}.npy", found)
        (folder / "scan.json").write_text(json.dumps(scan))

    folder = find_or_make(f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}", make)
    try:
        scan = json.loads((folder / "scan.json").read_text())
        spans = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in parts}
        for name, kind in (("sha256", str), ("largest", int), ("ends", list), ("labels", dict)):
            if not isinstance(scan[name], kind):
                raise TypeError(name)
    except (OSError, ValueError, EOFError, TypeError, KeyError) as error:
        raise damaged(folder, error) from None
    return scan, spans


def _scan(tokenizer: Tokenizer, parts: Mapping[str, Ids]):
    """Reads all ids once.

    Returns:
      (sha256, smallest and largest id; counts: id -> how often, of special tokens; ends: those
      that stand between documents; strange: an id that stands for nothing, or None; labels: split
      -> scored tokens), and split -> spans.
    """
    no_bytes = tokenizer.num_bytes == 0
    special = tokenizer.special | {tokenizer.separator: "separator"}
    kept = "<u2" if tokenizer.num_ids <= 2**16 else "<u4"  # the sha256 is of ids, not of containers
    digest = hashlib.sha256()
    smallest = largest = 0
    strange = None
    places = {split: [np.empty(0, np.int64)] for split in parts}
    found = {split: [np.empty(0, np.int64)] for split in parts}
    for split, ids in parts.items():
        digest.update(f"{split} {len(ids)} ".encode())
        for start in range(0, len(ids), _BLOCK):
            block = ids[start : start + _BLOCK]
            digest.update(block.astype(block.dtype if block.dtype == "<u2" else kept).tobytes())
            smallest = min(smallest, int(block.min()))
            largest = max(largest, int(block.max()))
            if smallest < 0 or largest >= tokenizer.num_ids or strange is not None:
                continue
            at = np.flatnonzero(no_bytes[block])
            values = block[at].astype(np.int64)
            strange = next((int(i) for i in np.unique(values) if int(i) not in special), None)
            places[split].append(start + at)
            found[split].append(values)
    every = np.concatenate([value for values in found.values() for value in values])
    counts = {int(i): int(n) for i, n in zip(*np.unique(every, return_counts=True))}
    ends = [] if strange is not None else _ends(counts, special, tokenizer.separator)
    spans, labels = {}, {}
    for split, ids in parts.items():
        positions, values = np.concatenate(places[split]), np.concatenate(found[split])
        is_end = np.isin(values, ends)
        spans[split] = _between(positions[is_end], len(ids))
        inside = int((~is_end).sum())
        labels[split] = int((spans[split][:, 1] - spans[split][:, 0]).sum()) - inside
    scan = {
        "sha256": digest.hexdigest(),
        "smallest": smallest,
        "largest": largest,
        "counts": counts,
        "ends": ends,
        "strange": strange,
        "labels": labels,
    }
    return scan, spans


def _ends(counts, special, separator) -> list[int]:
    """The special tokens in the files that stand between documents.

    They are the tokenizer's separator and those with the name of a begin or an end; where there
    are none, every special token is one, so that none is scored.
    """
    between = [
        i
        for i in counts
        if i == separator or _BETWEEN.fullmatch(re.sub("[^a-z]", "", special[i].lower()))
    ]
    return between or list(counts)


def _check(source, tokenizer, scan):
    """Raises UserError for ids that are not the tokenizer's."""
    remedy = "set data.tokenizer to the one that wrote the file"
    if scan["smallest"] < 0:
        raise UserError(f"data.source={source.name!r} holds the id {scan['smallest']:,}: {remedy}")
    if scan["largest"] >= tokenizer.num_ids:
        raise UserError(
            f"data.source={source.name!r} holds the id {scan['largest']:,} and the tokenizer"
            f" {tokenizer.name} has {tokenizer.num_ids:,}: {remedy}"
        )
    if scan["strange"] is not None:
        raise UserError(
            f"data.source={source.name!r} holds the id {scan['strange']:,}, which stands for no"
            f" bytes in the tokenizer {tokenizer.name}, so that bits per byte would be wrong:"
            f" {remedy}, which has to be a byte-level BPE"
        )


def _account(source, tokenizer, scan, streams, num_files, types) -> str:
    """What was read, for the log."""
    special = tokenizer.special | {
        tokenizer.separator: tokenizer.special.get(tokenizer.separator, "separator")
    }
    counts = {int(i): n for i, n in scan["counts"].items()}
    ends = [f"{counts[i]:,} of {special[i]} (id {i})" for i in scan["ends"]]
    inside = [f"{n:,} of {special[i]}" for i, n in counts.items() if i not in scan["ends"]]
    num_documents = sum(len(stream.spans) for stream in streams.values())
    num_ids = sum(len(stream.tokens) for stream in streams.values())
    text = f"{num_files:,} file{'s' * (num_files > 1)}, {num_ids:,} ids of {types}"
    text += f", {num_documents:,} document{'s' * (num_documents != 1)}, separators: "
    text += ", ".join(ends) or "none was found, so that each split is one document"
    if inside:
        text += f"; inside documents, trained on and not scored: {', '.join(inside)}"
    return text


def _refuse_characters(files: tuple[Path, ...], tokenizer: Tokenizer) -> None:
    """Raises UserError for nanoGPT's data of characters, whose ids are of no tokenizer of ours."""
    if tokenizer.name not in ("bytes", "gpt2"):
        return
    for file in files:
        meta, text = file.parent / "meta.pkl", file.parent / "input.txt"
        if meta.is_file():
            use = f"text:{text}" if text.is_file() else "text:PATH with the text it was made from"
            raise UserError(
                f"{file} is numbered by the characters that {meta.name} beside it lists, as in"
                f" nanoGPT's shakespeare_char, and not by the tokenizer {tokenizer.name}; that file"
                f" can run code when it is opened, so it never is: use data.source={use}"
            )
