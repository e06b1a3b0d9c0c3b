"""Tokenises on all cores: batches of pieces in, their ids out, in order.

The threads of the library do not help enough, because half of the work is Python's. So other
processes tokenise. They are started as programs: `multiprocessing` would import the user's script
again in each of them, and forking is unsafe once JAX has threads.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from qkvjax.data.encoding_worker import receive, send
from qkvjax.data.tokenizers import Tokenizer
from qkvjax.data.unencodable import Unencodable

_ALONE_BYTES = 4 << 20  # tokenised in this process, before others are worth their start
_MAX_WORKERS = 32  # of about 150 MB each; reading cannot supply more of them


class Batch(Protocol):
    """Something with pieces of documents to be tokenised."""

    pieces: list[bytes]


class UnencodablePiece(Exception):
    """A piece of a batch that the tokenizer cannot encode.

    Attributes:
      batch: the batch.
      piece: index of the piece.
      error: what the tokenizer raised.
    """

    def __init__(self, batch: Batch, piece: int, error: Unencodable):
        super().__init__(piece, error)
        self.batch = batch
        self.piece = piece
        self.error = error


def encode_batches(
    tokenizer: Tokenizer, batches: Iterable[Batch], dtype, num_workers: int | None = None
) -> Iterator[tuple[Batch, list[np.ndarray]]]:
    """Yields each batch with the ids of its pieces, arrays [n], in the order of the batches.

    Args:
      dtype: of the ids.
      num_workers: number of other processes, which tokenise after the first 4 MB; None: one for
        each core.

    Raises:
      UnencodablePiece: the tokenizer cannot encode a piece.
      ChildProcessError: another process ended, for example because memory ran out.
    """
    if num_workers is None:
        num_workers = _num_cores()
    if tokenizer.name == "bytes" or num_workers < 2 or not sys.executable:
        num_workers = 0
    batches = iter(batches)
    num_bytes = 0
    for batch in batches:
        yield batch, _encode(tokenizer, batch, dtype)
        num_bytes += sum(map(len, batch.pieces))
        if num_workers and num_bytes >= _ALONE_BYTES:
            break
    if num_workers:
        yield from _encode_by_workers(tokenizer, batches, dtype, num_workers)


def _num_cores() -> int:
    """Returns the number of cores that this process may use, at most _MAX_WORKERS."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return min(count, _MAX_WORKERS)


def _encode(tokenizer: Tokenizer, batch: Batch, dtype) -> list[np.ndarray]:
    """Returns the ids of each piece, encoded in this process."""
    encoded = []
    for index, piece in enumerate(batch.pieces):
        try:
            encoded.append(tokenizer.encode_piece(piece).astype(dtype))
        except Unencodable as error:
            raise UnencodablePiece(batch, index, error) from None
    return encoded


def _encode_by_workers(
    tokenizer: Tokenizer, batches: Iterator[Batch], dtype, max_workers: int
) -> Iterator[tuple[Batch, list[np.ndarray]]]:
    """Yields what `encode_batches` does; a thread for each other process waits for its answers."""
    workers = []
    idle = queue.SimpleQueue()

    def encode(batch):
        worker = idle.get()
        try:
            return worker.encode(batch)
        finally:
            idle.put(worker)

    with contextlib.ExitStack() as stack:
        # Callbacks run in reverse order. First the processes are killed, so that threads that wait
        # for an answer end; then the threads are joined; then nobody uses the pipes any more.
        stack.callback(lambda: [worker.close_pipes() for worker in workers])
        threads = stack.enter_context(ThreadPoolExecutor(max_workers))
        stack.callback(lambda: [worker.kill() for worker in workers])

        pending = collections.deque()
        for batch in batches:
            if len(workers) < max_workers:
                workers.append(_Worker(tokenizer, dtype))
                idle.put(workers[-1])
            pending.append((batch, threads.submit(encode, batch)))
            if len(pending) > max_workers:
                first, future = pending.popleft()
                yield first, future.result()
        for batch, future in pending:
            yield batch, future.result()


class _Worker:
    """Another process that tokenises, see `qkvjax.data.encoding_worker`."""

    def __init__(self, tokenizer: Tokenizer, dtype):
        self._dtype = np.dtype(dtype)
        program = [sys.executable, "-m", "qkvjax.data.encoding_worker"]
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [*program, tokenizer.spec, tokenizer.fingerprint, self._dtype.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )

    def encode(self, batch: Batch) -> list[np.ndarray]:
        """Returns the ids of each piece of a batch."""
        try:
            send(self._process.stdin, *batch.pieces)
            answer = receive(self._process.stdout)
        except (OSError, EOFError, ValueError):
            answer = None
        if answer is None:
            code = self._process.wait()
            raise ChildProcessError(
                f"a process that tokenises ended with code {code}; -9 means that the system had no"
                " memory left for it"
            )
        kind, *content = answer
        if kind == b"unencodable":
            facts = json.loads(content[0])
            error = Unencodable(facts["reason"], facts["position"])
            raise UnencodablePiece(batch, facts["piece"], error)
        counts = np.frombuffer(content[0], np.int64)
        ids = np.frombuffer(content[1], self._dtype)
        return [ids[end - count : end] for count, end in zip(counts, np.cumsum(counts))]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close_pipes(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # of a message that was not sent to its end
            self._process.stdin.close()
        self._process.stdout.close()
