"""From token ids of documents to rows of T + 1 tokens, and from rows to batches.

A row holds the inputs row[:T] and the targets row[1:]. Letters: n tokens of a document, T
`seq_len`, R rows. The separator is an id of its own that never stands inside a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np


def packed_rows(stream: Iterable[np.ndarray], seq_len: int, block_rows: int) -> Iterator:
    """Training rows: one stream of tokens, cut every T of them.

    Row i is stream[i T : i T + T + 1]; each token of the stream is a target once, the first
    one excepted. What is left at the end and fills no row is dropped.

    Args:
      stream: arrays [n] that follow on each other: separator, t1..tn of every document.
      block_rows: rows of a block; no more of the stream than that, and one of the arrays, is in
        memory.

    Yields:
      [block_rows, T + 1]; the last block may be smaller.
    """
    waiting, count = [], 0
    for part in stream:
        start = 0
        while start < len(part):
            # A block of R rows takes R T + 1 tokens, of which the next one repeats the last.
            taken = part[start : start + block_rows * seq_len + 1 - count]
            start += len(taken)
            waiting.append(taken)
            count += len(taken)
            if count == block_rows * seq_len + 1:
                tokens = np.concatenate(waiting)
                yield _rows(tokens, seq_len)
                waiting, count = [tokens[-1:]], 1
    if count > seq_len:
        tokens = np.concatenate(waiting)
        yield _rows(tokens[: num_packed_rows(count, seq_len) * seq_len + 1], seq_len)


def _rows(tokens, seq_len):
    """[R, T + 1] of [R T + 1] tokens; a row begins with the last token of the one before."""
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def window_rows(
    documents: Iterable[np.ndarray],
    separator: int,
    seq_len: int,
    block_rows: int,
    first_only: bool = False,
) -> Iterator[np.ndarray]:
    """The rows of `window` of each document in order, with `first_only` window 0 alone.

    Args:
      documents: arrays [n].

    Yields:
      [block_rows, T + 1]; the last block may be smaller.
    """
    waiting, count = [], 0
    for document in documents:
        num_rows = 1 if first_only else num_windows(len(document), seq_len)
        at = 0
        while at < num_rows:
            taken = min(num_rows - at, block_rows - count)
            waiting.append(_windows(document, at, taken, separator, seq_len))
            at += taken
            count += taken
            if count == block_rows:
                yield np.concatenate(waiting)
                waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _windows(document, index, count, separator, seq_len):
    """[count, T + 1]: windows index, index + 1, ... of a document."""
    padded = np.full(count * seq_len + 1, separator, np.int32)
    start = index * seq_len - 1  # in the document; the separator stands at -1
    tokens = document[max(start, 0) : start + len(padded)]
    offset = max(-start, 0)
    padded[offset : offset + len(tokens)] = tokens
    return _rows(padded, seq_len)


def num_packed_rows(num_tokens: int, seq_len: int) -> int:
    """Rows that a stream of so many tokens gives."""
    return max(0, (num_tokens - 1) // seq_len)


def window(document: np.ndarray, index: int, separator: int, seq_len: int) -> np.ndarray:
    """Window `index` of one document on its own: s[w T : w T + T + 1] of s = [separator, t1..tn].

    The targets of windows 0, 1, ... are t1..tn, each once. The tail is filled up with the
    separator, which is how a target that is padding is told. Window 0 is also the padded row
    of `data.score_pads`.

    Returns:
      int32 [T + 1].
    """
    return _windows(document, index, 1, separator, seq_len)[0]


def num_windows(num_tokens, seq_len: int):
    """Windows of a document of n tokens (an int or an array): n / T, rounded up."""
    return -(-num_tokens // seq_len)


def training_batch(rows: np.ndarray, separator: int, score_pads: bool) -> dict[str, np.ndarray]:
    """The five arrays of a batch, each label of weight 1.

    A new document starts at each separator among the inputs. Positions restart at 0 there and
    at the row's start; segment ids count 1, 2, ... in the row. With `score_pads` a row is one
    segment.

    Args:
      rows: int32 [R, T + 1].

    Returns:
      inputs, targets, positions, segment_ids: int32 [R, T]; weights: float32 [R, T].
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    index = np.arange(inputs.shape[1], dtype=np.int32)
    starts = np.zeros_like(inputs, bool) if score_pads else inputs == separator
    starts[:, 0] = True
    return {
        "inputs": inputs,
        "targets": targets,
        "positions": index - np.maximum.accumulate(np.where(starts, index, 0), axis=1),
        "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32),
        "weights": np.ones(targets.shape, np.float32),
    }


def scored_batch(
    rows: np.ndarray, separator: int, score_pads: bool, bytes_of_id: np.ndarray
) -> dict[str, np.ndarray]:
    """A training batch whose labels of no bytes weigh 0 (1 with `score_pads`): separators, and so
    padding, and special tokens inside documents.

    Args:
      rows: int32 [R, T + 1].
      bytes_of_id: int32 [ids], bytes that each id stands for, 0 for the separator.

    Returns:
      The arrays of `training_batch`; num_bytes, int32 [R, T], bytes of each label; pad_labels,
      int32 [R], scored labels that are padding.
    """
    batch = training_batch(rows, separator, score_pads)
    targets = batch["targets"]
    is_pad = targets == separator
    if not score_pads:
        batch["weights"][is_pad | (bytes_of_id[targets] == 0)] = 0
    batch["num_bytes"] = bytes_of_id[targets].astype(np.int32)
    batch["pad_labels"] = (is_pad & (batch["weights"] > 0)).sum(1, dtype=np.int32)
    return batch


Window = tuple[np.ndarray, int]  # int32 [n + 1] tokens, and the number of their document


def rows_of_windows(windows: Iterable[Window], separator: int) -> Iterator[list[Window]]:
    """Puts document windows, in order, into as few rows of T labels as this order allows.

    Which windows share a row follows from the windows alone, not from a batch size, so a score
    that sums over rows does not depend on one.

    Args:
      windows: int32 [T + 1] each, as `window` makes them, with the number of its document.

    Yields:
      The windows of one row without their padding, int32 [n + 1] each; the labels n add up to at
      most T.
    """
    row: list[Window] = []
    used = 0
    for tokens, document in windows:
        num_labels = int(np.count_nonzero(tokens[1:] != separator))
        if row and used + num_labels > len(tokens) - 1:
            yield row
            row = []
            used = 0
        row.append((tokens[: num_labels + 1], document))
        used += num_labels
    if row:
        yield row


def windows_batch(
    rows: list[list[Window]], seq_len: int, separator: int, bytes_of_id: np.ndarray
) -> dict[str, np.ndarray]:
    """A batch of rows of windows: each window is a segment, so that it sees nothing else.

    Args:
      rows: R rows as `rows_of_windows` yields them.
      seq_len: T.
      bytes_of_id: int32 [ids], bytes that each id stands for.

    Returns:
      The arrays of `scored_batch`, and items, int32 [R, T], the number of each label's document.
      Padding weighs 0 and is a segment of its own.
    """
    shape = (len(rows), seq_len)
    inputs = np.full(shape, separator, np.int32)
    targets = np.full(shape, separator, np.int32)
    positions = np.zeros(shape, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    items = np.zeros(shape, np.int32)
    label_bytes = np.zeros(shape, np.int32)
    for i, windows in enumerate(rows):
        start = 0
        for segment, (tokens, document) in enumerate(windows, 1):
            labels = slice(start, start + len(tokens) - 1)
            inputs[i, labels] = tokens[:-1]
            targets[i, labels] = tokens[1:]
            positions[i, labels] = np.arange(len(tokens) - 1)
            segment_ids[i, labels] = segment
            items[i, labels] = document
            label_bytes[i, labels] = bytes_of_id[tokens[1:]]
            start = labels.stop
    return {
        "inputs": inputs,
        "targets": targets,
        "positions": positions,
        "segment_ids": segment_ids,
        "weights": (label_bytes > 0).astype(np.float32),  # special tokens stand for no text
        "num_bytes": label_bytes,
        "items": items,
        "pad_labels": np.zeros(len(rows), np.int32),
    }
