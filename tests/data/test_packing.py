import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkvjax.data.packing import (
    num_packed_rows,
    num_windows,
    packed_rows,
    rows_of_windows,
    scored_batch,
    training_batch,
    window,
    window_rows,
    windows_batch,
)

SEPARATOR = 9
BYTES = np.array([1] * 9 + [0], np.int32)
documents = st.lists(
    st.lists(st.integers(0, 8), min_size=1, max_size=40).map(np.array), min_size=1, max_size=8
)
lengths = st.integers(1, 12)


def windows(document, seq_len):
    count = num_windows(len(document), seq_len)
    return np.stack([window(document, i, SEPARATOR, seq_len) for i in range(count)])


def stream_of(docs):
    return np.concatenate([[SEPARATOR, *doc] for doc in docs])


@given(documents, lengths, st.integers(1, 5), st.integers(1, 30))
def test_packed_rows_are_slices_of_one_stream(docs, seq_len, block_rows, size):
    stream = stream_of(docs)
    parts = [stream[i : i + size] for i in range(0, len(stream), size)]
    blocks = list(packed_rows(parts, seq_len, block_rows))
    rows = [row for block in blocks for row in block]
    assert all(len(block) == block_rows for block in blocks[:-1])
    assert len(rows) == num_packed_rows(len(stream), seq_len)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row, stream[i * seq_len : i * seq_len + seq_len + 1])


@given(documents, lengths, st.integers(1, 5), st.booleans())
def test_window_rows_are_the_windows_of_each_document(docs, seq_len, block_rows, first_only):
    blocks = list(window_rows(docs, SEPARATOR, seq_len, block_rows, first_only))
    expected = [windows(doc, seq_len)[: 1 if first_only else None] for doc in docs]
    assert all(len(block) == block_rows for block in blocks[:-1])
    np.testing.assert_array_equal(np.concatenate(blocks), np.concatenate(expected))


@pytest.mark.parametrize("seq_len", [1, 2, 7, 1024])
def test_a_document_has_no_more_windows_than_its_tokens_need(seq_len):
    """A multiple of T tokens fills its windows, and no empty one follows."""
    counts = [
        0,
        1,
        seq_len - 1,
        seq_len,
        seq_len + 1,
        3 * seq_len - 1,
        3 * seq_len,
        3 * seq_len + 1,
    ]
    expected = [math.ceil(count / seq_len) for count in counts]
    assert [num_windows(count, seq_len) for count in counts] == expected
    np.testing.assert_array_equal(num_windows(np.array(counts), seq_len), expected)


def test_packing_copies_each_token_a_few_times():
    """No token is copied more than a few times, in rows of many small documents."""
    seq_len = 4096
    copied = []

    class Watched(np.ndarray):
        def __array_finalize__(self, other):
            copied.append(self.size)

    def documents():
        for _ in range(20_000):
            yield np.zeros(10, np.int32).view(Watched)

    rows = sum(len(block) for block in packed_rows(documents(), seq_len, 32))
    assert rows == (200_000 - 1) // seq_len
    assert sum(copied) < 10 * 200_000


@given(documents, lengths)
def test_every_token_is_a_scored_target_once(docs, seq_len):
    for doc in docs:
        batch = scored_batch(windows(doc, seq_len), SEPARATOR, False, BYTES)
        scored = batch["targets"][batch["weights"] > 0]
        np.testing.assert_array_equal(scored, doc)
        assert batch["weights"].sum() == batch["num_bytes"].sum() == len(doc)
        assert batch["pad_labels"].sum() == 0


@given(documents, lengths)
def test_a_window_reads_the_separator_then_only_its_own_document(docs, seq_len):
    for doc in docs:
        read = windows(doc, seq_len)[:, :-1].reshape(-1)
        np.testing.assert_array_equal(read[: len(doc)], [SEPARATOR, *doc[:-1]])


@given(documents, lengths)
def test_positions_and_segments_follow_the_separators(docs, seq_len):
    blocks = list(packed_rows([stream_of(docs)], seq_len, 100))
    if not blocks:
        return
    batch = training_batch(blocks[0], SEPARATOR, False)
    assert (batch["weights"] == 1).all()
    for inputs, positions, segments in zip(
        batch["inputs"], batch["positions"], batch["segment_ids"]
    ):
        position = -1
        segment = 1
        for i, token in enumerate(inputs):
            fresh = token == SEPARATOR or i == 0
            position = 0 if fresh else position + 1
            segment += fresh and i > 0
            assert (positions[i], segments[i]) == (position, segment)


def test_score_pads_is_one_segment_and_every_label_counts():
    rows = np.stack([window(np.array([1, 2]), 0, SEPARATOR, 4), np.array([SEPARATOR, 3, 4, 5, 6])])
    batch = scored_batch(rows, SEPARATOR, True, BYTES)
    np.testing.assert_array_equal(batch["targets"], [[1, 2, 9, 9], [3, 4, 5, 6]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3]] * 2)
    assert (batch["segment_ids"] == 1).all() and (batch["weights"] == 1).all()
    np.testing.assert_array_equal(batch["pad_labels"], [2, 0])
    np.testing.assert_array_equal(batch["num_bytes"].sum(1), [2, 4])


def test_dtypes():
    batch = scored_batch(windows(np.array([1, 2, 3]), 2), SEPARATOR, False, BYTES)
    dtypes = {name: array.dtype.name for name, array in batch.items()}
    assert dtypes.pop("weights") == "float32"
    assert set(dtypes.values()) == {"int32"}


@given(documents, lengths)
def test_windows_share_rows_in_order_as_long_as_they_fit(docs, seq_len):
    cut = [(one, i) for i, doc in enumerate(docs) for one in windows(doc, seq_len)]
    rows = list(rows_of_windows(cut, SEPARATOR))
    expected = [([token for token in one[1:] if token != SEPARATOR], i) for one, i in cut]
    found = [(tokens[1:].tolist(), i) for row in rows for tokens, i in row]
    assert found == expected
    labels = [sum(len(tokens) - 1 for tokens, _ in row) for row in rows]
    assert max(labels) <= seq_len
    for used, row in zip(labels, rows[1:]):  # a row ends only where the next window does not fit
        assert used + len(row[0][0]) - 1 > seq_len


@given(documents, lengths)
def test_each_window_of_a_row_is_a_segment_and_padding_is_another(docs, seq_len):
    num_bytes = np.array([3, *[1] * 7, 0, 0])  # 8 is a special token, which stands for no text
    cut = [(one, i) for i, doc in enumerate(docs) for one in windows(doc, seq_len)]
    rows = list(rows_of_windows(cut, SEPARATOR))
    batch = windows_batch(rows, seq_len, SEPARATOR, num_bytes)
    for i, row in enumerate(rows):
        arrays = {name: batch[name][i] for name in batch}
        segments = arrays["segment_ids"]
        kinds, starts = np.unique(segments, return_index=True)
        used = sum(len(tokens) - 1 for tokens, _ in row)
        assert len(kinds) == len(row) + (used < seq_len)
        assert (arrays["weights"][used:] == 0).all() and len(set(segments[used:])) <= 1
        assert arrays["pad_labels"] == 0
        for start, (tokens, document) in zip(np.sort(starts), row):  # padding is the last
            labels = slice(start, start + len(tokens) - 1)
            assert (segments == segments[start]).sum() == len(tokens) - 1
            assert set(segments[labels]) == {segments[start]}
            np.testing.assert_array_equal(arrays["inputs"][labels], tokens[:-1])
            np.testing.assert_array_equal(arrays["targets"][labels], tokens[1:])
            np.testing.assert_array_equal(arrays["positions"][labels], range(len(tokens) - 1))
            np.testing.assert_array_equal(arrays["num_bytes"][labels], num_bytes[tokens[1:]])
            np.testing.assert_array_equal(arrays["weights"][labels], num_bytes[tokens[1:]] > 0)
            assert set(arrays["items"][labels]) == {document}
