"""From token ids of documents to rows of T + 1 tokens, and from rows to batches.

A row contains the inputs row[:T] and the targets row[1:]. Letters: n tokens of a document, T
`seq_len`, R rows. The separator is an id that never occurs inside a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

Window = tuple[np.ndarray, int]  # int32 [n + 1] tokens, and the number of their document


def packed_rows(
    stream: Iterable[np.ndarray], seq_len: int, block_rows: int
) -> Iterator[np.ndarray]:
    """Yields training rows: one stream of tokens, cut every T of them.

    Row i is stream[i T : i T + T + 1]. So each token of the stream is a target once, except for the
    first. Tokens at the end that do not fill a row are dropped.

    Args:
      stream: arrays [n] that follow each other: separator, t1..tn of every document.
      block_rows: rows of a block; only that much of the stream, and one of the arrays, is in memory
        at a time.

    Yields:
      [block_rows, T + 1]; the last block may be smaller.
    """
    block_tokens = block_rows * seq_len + 1
    pending = []
    count = 0
    for array in stream:
        start = 0
        while start < len(array):
            piece = array[start : start + block_tokens - count]
            start += len(piece)
            pending.append(piece)
            count += len(piece)
            if count == block_tokens:
                tokens = np.concatenate(pending)
                yield _cut_rows(tokens, seq_len)
                pending = [tokens[-1:]]  # the next block begins with the last token of this one
                count = 1
    if count > seq_len:
        tokens = np.concatenate(pending)
        num_rows = num_packed_rows(count, seq_len)
        yield _cut_rows(tokens[: num_rows * seq_len + 1], seq_len)


def window_rows(
    documents: Iterable[np.ndarray],
    separator: int,
    seq_len: int,
    block_rows: int,
    first_only: bool = False,
) -> Iterator[np.ndarray]:
    """Yields the windows (see `window`) of each document in order.

    Args:
      documents: arrays [n].
      first_only: only window 0 of each document.

    Yields:
      [block_rows, T + 1]; the last block may be smaller.
    """
    pending = []
    count = 0
    for document in documents:
        num_rows = 1 if first_only else num_windows(len(document), seq_len)
        index = 0
        while index < num_rows:
            num_taken = min(num_rows - index, block_rows - count)
            pending.append(_windows(document, index, num_taken, separator, seq_len))
            index += num_taken
            count += num_taken
            if count == block_rows:
                yield np.concatenate(pending)
                pending = []
                count = 0
    if pending:
        yield np.concatenate(pending)


def num_packed_rows(num_tokens: int, seq_len: int) -> int:
    """Returns the number of rows that a stream of this many tokens gives."""
    return max(0, (num_tokens - 1) // seq_len)


def window(document: np.ndarray, index: int, separator: int, seq_len: int) -> np.ndarray:
    """Returns window w = `index` of one document: s[w T : w T + T + 1] of s = [separator, t1..tn].

    The targets of windows 0, 1, ... are t1..tn, each once. The last window is filled up with the
    separator, so a target that is the separator is padding. Window 0 is also the padded row of
    `data.score_pads`.

    Returns:
      int32 [T + 1].
    """
    return _windows(document, index, 1, separator, seq_len)[0]


def num_windows(num_tokens, seq_len: int):
    """Returns the number of windows of a document of n tokens: n / T, rounded up.

    Args:
      num_tokens: an int, or an array for several documents.
    """
    return -(-num_tokens // seq_len)


def _cut_rows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Returns [R, T + 1] of [R T + 1] tokens; a row begins with the last token of the previous."""
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def _windows(
    document: np.ndarray, index: int, count: int, separator: int, seq_len: int
) -> np.ndarray:
    """Returns windows index, index + 1, ... of a document, int32 [count, T + 1]."""
    padded = np.full(count * seq_len + 1, separator, np.int32)
    start = index * seq_len - 1  # in the document, whose separator is at position -1
    tokens = document[max(start, 0) : start + len(padded)]
    offset = max(-start, 0)
    padded[offset : offset + len(tokens)] = tokens
    return _cut_rows(padded, seq_len)


def training_batch(rows: np.ndarray, separator: int, score_pads: bool) -> dict[str, np.ndarray]:
    """Returns the five arrays of a batch, in which every label has weight 1.

    A new document starts at each separator among the inputs. Positions restart at 0 there and at
    the start of the row. Segment ids count 1, 2, ... in the row. With `score_pads` a row is one
    segment.

    Args:
      rows: int32 [R, T + 1].

    Returns:
      inputs, targets, positions, segment_ids: int32 [R, T]; weights: float32 [R, T].
    """
    inputs = rows[:, :-1]
    targets = rows[:, 1:]
    index = np.arange(inputs.shape[1], dtype=np.int32)
    starts = np.zeros_like(inputs, bool) if score_pads else inputs == separator
    starts[:, 0] = True
    start_of_segment = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return {
        "inputs": inputs,
        "targets": targets,
        "positions": index - start_of_segment,
        "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32),
        "weights": np.ones(targets.shape, np.float32),
    }


def scored_batch(
    rows: np.ndarray, separator: int, score_pads: bool, bytes_of_id: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns a training batch in which labels that stand for no bytes have weight 0.

    These are separators, which include padding, and special tokens inside documents. With
    `score_pads` their weight is 1.

    Args:
      rows: int32 [R, T + 1].
      bytes_of_id: int32 [ids], bytes that each id stands for, 0 for the separator.

    Returns:
      The arrays of `training_batch`; num_bytes, int32 [R, T], bytes of each label; pad_labels,
      int32 [R], number of scored labels that are padding.
    """
    batch = training_batch(rows, separator, score_pads)
    targets = batch["targets"]
    is_pad = targets == separator
    if not score_pads:
        batch["weights"][is_pad | (bytes_of_id[targets] == 0)] = 0
    batch["num_bytes"] = bytes_of_id[targets].astype(np.int32)
    batch["pad_labels"] = (is_pad & (batch["weights"] > 0)).sum(1, dtype=np.int32)
    return batch


def rows_of_windows(windows: Iterable[Window], separator: int) -> Iterator[list[Window]]:
    """Puts document windows, in order, into as few rows of T labels as this order allows.

    Which windows share a row depends on the windows alone, not on a batch size. So a score that
    sums over rows does not depend on the batch size either.

    Args:
      windows: int32 [T + 1] each, as `window` makes them, with the number of its document.

    Yields:
      The windows of one row without their padding, int32 [n + 1] each; their labels n add up to at
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
    """Returns a batch of rows of windows; each window is a segment, so it sees no other window.

    Args:
      rows: R rows as `rows_of_windows` yields them.
      seq_len: T.
      bytes_of_id: int32 [ids], bytes that each id stands for.

    Returns:
      The arrays of `scored_batch`, and items, int32 [R, T], the number of each label's document.
      Padding has weight 0 and is a segment of its own.
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
        "weights": (label_bytes > 0).astype(np.float32),  # special tokens stand for no bytes
        "num_bytes": label_bytes,
        "items": items,
        "pad_labels": np.zeros(len(rows), np.int32),
    }
