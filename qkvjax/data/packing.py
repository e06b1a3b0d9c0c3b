"""From token ids of documents to rows of T + 1 tokens, and from rows to batches.

A row holds the inputs row[:T] and the targets row[1:]. Letters: n tokens of a document, T
`seq_len`, R rows. The separator is an id of its own that never stands inside a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np


def packed_rows(
    documents: Iterable[np.ndarray], separator: int, seq_len: int
) -> Iterator[np.ndarray]:
    """Training rows: separator, t1..tn of every document as one stream, cut every T tokens.

    Row i is stream[i T : i T + T + 1]; each token of the stream is a target once, the first
    one excepted. What is left at the end and fills no row is dropped.

    Args:
      documents: int arrays [n].

    Yields:
      int32 [T + 1].
    """
    stream = np.empty(0, np.int32)
    for document in documents:
        stream = np.concatenate([stream, [separator], document], dtype=np.int32, casting="unsafe")
        count = num_packed_rows(len(stream), seq_len)
        for i in range(count):
            yield stream[i * seq_len : (i + 1) * seq_len + 1]
        stream = stream[count * seq_len :]


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
    row = np.full(seq_len + 1, separator, np.int32)
    start = index * seq_len - 1  # in the document; the separator stands at -1
    tokens = document[max(start, 0) : start + seq_len + 1]
    offset = max(-start, 0)
    row[offset : offset + len(tokens)] = tokens
    return row


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
      The arrays of `training_batch`, and int32 [R]: num_bytes, bytes of the scored tokens;
      pad_labels, scored labels that are padding.
    """
    batch = training_batch(rows, separator, score_pads)
    targets = batch["targets"]
    is_pad = targets == separator
    if not score_pads:
        batch["weights"][is_pad | (bytes_of_id[targets] == 0)] = 0
    batch["num_bytes"] = bytes_of_id[targets].sum(1, dtype=np.int32)
    batch["pad_labels"] = (is_pad & (batch["weights"] > 0)).sum(1, dtype=np.int32)
    return batch


def rows_of_windows(
    windows: Iterable[np.ndarray], separator: int
) -> Iterator[list[np.ndarray]]:
    """Puts document windows, in order, into as few rows of T labels as this order allows.

    Which windows share a row follows from the windows alone, not from a batch size, so a score
    that sums over rows does not depend on one.

    Args:
      windows: int32 [T + 1] each, as `window` makes them.

    Yields:
      The windows of one row without their padding, int32 [n + 1] each; the labels n add up to at
      most T.
    """
    row: list[np.ndarray] = []
    used = 0
    for tokens in windows:
        num_labels = int(np.count_nonzero(tokens[1:] != separator))
        if row and used + num_labels > len(tokens) - 1:
            yield row
            row = []
            used = 0
        row.append(tokens[: num_labels + 1])
        used += num_labels
    if row:
        yield row


def windows_batch(
    rows: list[list[np.ndarray]], seq_len: int, separator: int, bytes_of_id: np.ndarray
) -> dict[str, np.ndarray]:
    """A batch of rows of windows: each window is a segment, so that it sees nothing else.

    Args:
      rows: R rows as `rows_of_windows` yields them.
      seq_len: T.
      bytes_of_id: int32 [ids], bytes that each id stands for.

    Returns:
      The arrays of `scored_batch`, [R, T] and [R]. Padding weighs 0 and is a segment of its own.
    """
    shape = (len(rows), seq_len)
    inputs = np.full(shape, separator, np.int32)
    targets = np.full(shape, separator, np.int32)
    positions = np.zeros(shape, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    num_bytes = np.zeros(len(rows), np.int32)
    for i, windows in enumerate(rows):
        start = 0
        for segment, tokens in enumerate(windows, 1):
            labels = slice(start, start + len(tokens) - 1)
            inputs[i, labels] = tokens[:-1]
            targets[i, labels] = tokens[1:]
            positions[i, labels] = np.arange(len(tokens) - 1)
            segment_ids[i, labels] = segment
            weights[i, labels] = 1
            num_bytes[i] += bytes_of_id[tokens[1:]].sum()
            start = labels.stop
    return {
        "inputs": inputs,
        "targets": targets,
        "positions": positions,
        "segment_ids": segment_ids,
        "weights": weights,
        "num_bytes": num_bytes,
        "pad_labels": np.zeros(len(rows), np.int32),
    }
