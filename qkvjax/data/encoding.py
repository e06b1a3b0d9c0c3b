"""Tokenising on all cores: batches of pieces in, their ids out, in order.

The library's threads do not help enough, since half of the work is Python's; so other processes
tokenise. They are started as programs, not by `multiprocessing`, which imports the user's script
again in each of them, and not by forking, which is unsafe once JAX has threads.
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
from qkvjax.data.unencodable import Unfit

_ALONE = 4 << 20  # bytes that are tokenised here before other processes are worth their start
_MOST_WORKERS = 32  # of about 150 MB each; reading does not keep more of them busy


class Batch(Protocol):
    """Something with pieces to be tokenised."""

    pieces: list[bytes]


class UnfitPiece(Exception):
    """A piece of a batch that the tokenizer does not take.

    Attributes:
      batch: the batch.
      piece: which of its pieces.
      why: the tokenizer's `Unfit`.
    """

    def __init__(self, batch: Batch, piece: int, why: Unfit):
        super().__init__(piece, why)
        self.batch = batch
        self.piece = piece
        self.why = why


def encoded(
    tokenizer: Tokenizer, batches: Iterable[Batch], dtype, num_workers: int | None = None
) -> Iterator[tuple[Batch, list[np.ndarray]]]:
    """Each batch with the ids of its pieces, arrays [n], in the order of the batches.

    Args:
      dtype: of the ids.
      num_workers: other processes that tokenise, from the second 4 MB on; None: one a core.

    Raises:
      UnfitPiece: a piece is not what the tokenizer takes.
      ChildProcessError: another process ended, for want of memory say.
    """
    if num_workers is None:
        num_workers = _cores()
    if tokenizer.name == "bytes" or num_workers < 2 or not sys.executable:
        num_workers = 0
    batches = iter(batches)
    done = 0
    for batch in batches:
        yield batch, _encode(tokenizer, batch, dtype)
        done += sum(map(len, batch.pieces))
        if num_workers and done >= _ALONE:
            break
    if num_workers:
        yield from _by_workers(tokenizer, batches, dtype, num_workers)


def _cores():
    """Cores that this process may use, as far as more of them help."""
    known = hasattr(os, "sched_getaffinity")  # on Linux
    count = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return min(count, _MOST_WORKERS)


def _encode(tokenizer, batch, dtype):
    found = []
    for number, piece in enumerate(batch.pieces):
        try:
            found.append(tokenizer.encode_piece(piece).astype(dtype))
        except Unfit as why:
            raise UnfitPiece(batch, number, why) from None
    return found


def _by_workers(tokenizer, batches, dtype, count):
    workers, free = [], queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        # In reverse: a thread that waits for a process sees its end, and then leaves the pipes.
        stack.callback(lambda: [worker.close() for worker in workers])
        threads = stack.enter_context(ThreadPoolExecutor(count))
        stack.callback(lambda: [worker.kill() for worker in workers])

        def ask(batch):
            worker = free.get()
            try:
                return worker.ask(batch)
            finally:
                free.put(worker)

        waiting = collections.deque()
        for batch in batches:
            if len(workers) < count:
                workers.append(_Worker(tokenizer, dtype))
                free.put(workers[-1])
            waiting.append((batch, threads.submit(ask, batch)))
            if len(waiting) > count:
                batch, answer = waiting.popleft()
                yield batch, answer.result()
        for batch, answer in waiting:
            yield batch, answer.result()


class _Worker:
    """Another process that tokenises."""

    def __init__(self, tokenizer, dtype):
        self._dtype = np.dtype(dtype)
        program = [sys.executable, "-m", "qkvjax.data.encoding_worker"]
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [*program, tokenizer.spec, tokenizer.fingerprint, self._dtype.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )

    def ask(self, batch):
        """The ids of each piece of a batch."""
        try:
            send(self._process.stdin, *batch.pieces)
            answer = receive(self._process.stdout)
        except (OSError, EOFError, ValueError):
            answer = None
        if answer is None:
            code = self._process.wait()
            raise ChildProcessError(
                f"a process that tokenises ended with code {code}; -9 says that the system had no"
                " memory left for it"
            )
        kind, *rest = answer
        if kind == b"unfit":
            facts = json.loads(rest[0])
            raise UnfitPiece(batch, facts["piece"], Unfit(facts["reason"], facts["at"]))
        counts = np.frombuffer(rest[0], np.int64)
        ids = np.frombuffer(rest[1], self._dtype)
        return [ids[end - count : end] for count, end in zip(counts, np.cumsum(counts))]

    def kill(self):
        self._process.kill()
        self._process.wait()

    def close(self):
        with contextlib.suppress(BrokenPipeError):  # of what was not sent to the end
            self._process.stdin.close()
        self._process.stdout.close()
