"""`tokens:`: files of token ids, mapped into memory as they are.

The first use of the files reads them once (`qkvjax.data.token_scan`) and keeps in the data folder
where their documents are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from qkvjax.data.sources import TokenFiles
from qkvjax.data.split import HELD_OUT
from qkvjax.data.token_ids import Ids
from qkvjax.data.token_scan import Scan, load_or_scan
from qkvjax.data.token_shards import Shard, open_shard
from qkvjax.data.token_widths import recognise_widths, width_warning
from qkvjax.data.tokenizers import Tokenizer
from qkvjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The ids of one split, and where its documents are.

    Attributes:
      tokens: [n] whole numbers, read by slices. Every id that ends a document in the files is read
        as the tokenizer's separator.
      spans: int64 [documents, 2], start and end of each document, without separators; documents
        without a token are left out. Tokens before the first separator are a document too.
      num_labels: tokens that are scored: those of documents, without special tokens.
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

    Without validation files, the last tenth of the stream is held out.

    Args:
      whole: all of the stream is "validation", to score it.
      log: gets a line about files, documents and separators.

    Returns:
      (split -> stream, sha256 of the ids).

    Raises:
      UserError: an empty or truncated file, another format, ids that are not the tokenizer's.
    """
    files = source.train_files + source.validation_files
    _refuse_character_ids(files, tokenizer)
    shards = [open_shard(file, source.dtype) for file in files]
    if source.dtype:
        for warning in filter(None, map(width_warning, shards)):
            log(f"data: warning: {warning}")
    shards = recognise_widths(shards, tokenizer.num_ids, source.name)
    splits = _splits(source, shards, whole)
    scan, spans = load_or_scan(source, tokenizer, whole, splits)
    scan.check(source.name, tokenizer)
    streams = {
        split: TokenStream(
            tokens=ids.with_ends(tuple(scan.ends), tokenizer.separator),
            spans=spans[split],
            num_labels=scan.labels[split],
        )
        for split, ids in splits.items()
    }
    log(f"data: {source.name}: {_summary(shards, streams)}, {_special_counts(tokenizer, scan)}")
    return streams, scan.sha256


def _splits(source: TokenFiles, shards: list[Shard], whole: bool) -> Mapping[str, Ids]:
    """Returns split -> its ids."""
    num_train_files = len(source.train_files)
    train = Ids(shards[:num_train_files])
    if not source.validation_files:
        cut = 0 if whole else len(train) * (HELD_OUT - 1) // HELD_OUT
        return {"train": train.part(0, cut), "validation": train.part(cut, len(train))}
    if whole:
        count = "two" if len(shards) == 2 else f"{len(shards):,}"
        raise UserError(
            f"data.source={source.name!r} is {count} files in two splits, and evaluate scores one"
            f" of them: write tokens:{source.validation}"
        )
    return {"train": train, "validation": Ids(shards[num_train_files:])}


def _summary(shards: list[Shard], streams: Mapping[str, TokenStream]) -> str:
    """Returns files, ids, types and documents that were read, for the log."""
    types = " and ".join(sorted({shard.dtype.name for shard in shards}))
    num_ids = sum(len(stream.tokens) for stream in streams.values())
    num_documents = sum(len(stream.spans) for stream in streams.values())
    file_word = "file" if len(shards) == 1 else "files"
    document_word = "document" if num_documents == 1 else "documents"
    return (
        f"{len(shards):,} {file_word}, {num_ids:,} ids of {types}, {num_documents:,}"
        f" {document_word}"
    )


def _special_counts(tokenizer: Tokenizer, scan: Scan) -> str:
    """Returns which special tokens were read and how often, for the log."""
    names = {tokenizer.separator: "separator"} | tokenizer.special
    ends = [f"{scan.counts[i]:,} of {names[i]} (id {i})" for i in scan.ends]
    inside = [f"{count:,} of {names[i]}" for i, count in scan.counts.items() if i not in scan.ends]
    text = ", ".join(ends) or "none was found, so that each split is one document"
    text = f"separators: {text}"
    if inside:
        text += f"; inside documents, trained on and not scored: {', '.join(inside)}"
    return text


def _refuse_character_ids(files: tuple[Path, ...], tokenizer: Tokenizer) -> None:
    """Raises UserError for nanoGPT's data of characters, whose ids belong to no tokenizer here.

    Their ids are all small, so the scan would accept them for `bytes` and `gpt2`.
    """
    if tokenizer.name not in ("bytes", "gpt2"):
        return
    for file in files:
        meta = file.parent / "meta.pkl"
        if not meta.is_file():
            continue
        text = file.parent / "input.txt"
        use = f"text:{text}" if text.is_file() else "text:PATH with the text it was made from"
        raise UserError(
            f"{file} holds the numbers of characters that {meta.name} beside it lists, as in"
            f" nanoGPT's shakespeare_char, and not ids of the tokenizer {tokenizer.name}; that file"
            f" can run code when it is opened, so it is never opened: use data.source={use}"
        )
