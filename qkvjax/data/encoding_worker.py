"""Tokenises for another process: pieces of documents come on stdin, their ids go to stdout.

  python -m qkvjax.data.encoding_worker TOKENIZER FINGERPRINT DTYPE

A message is a list of byte strings: how many, the length of each, then all of them. The answer to
some pieces is b"ids", the number of ids of each piece (int64) and all ids; or b"unfit" and JSON.
The process ends with its input.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from typing import BinaryIO

import numpy as np

_COUNT = struct.Struct("<q")


def send(pipe: BinaryIO, *messages: bytes) -> None:
    """Writes one list of byte strings."""
    pipe.write(_COUNT.pack(len(messages)))
    pipe.write(np.array([len(message) for message in messages], "<i8").tobytes())
    for message in messages:
        pipe.write(message)
    pipe.flush()


def receive(pipe: BinaryIO) -> list[bytes] | None:
    """Reads what `send` wrote; None at the end of the pipe.

    Raises:
      EOFError: it ends within a message.
    """
    head = pipe.read(_COUNT.size)
    if not head:
        return None
    (count,) = _COUNT.unpack(_all(head, _COUNT.size))
    lengths = np.frombuffer(_all(pipe.read(8 * count), 8 * count), "<i8").tolist()
    return [_all(pipe.read(length), length) for length in lengths]


def _all(data, length):
    if len(data) != length:
        raise EOFError("the other process ended")
    return data


def main(spec: str, fingerprint: str, dtype: str) -> int:
    """Answers until stdin ends; 2 when the tokenizer is not the one of this fingerprint."""
    from qkvjax.data.tokenizers import load_tokenizer
    from qkvjax.data.unencodable import Unfit

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process gets it too, and decides
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    tokenizer = load_tokenizer(spec)
    if tokenizer.fingerprint != fingerprint:
        print(f"data.tokenizer={spec!r} changed while it was used", file=sys.stderr)
        return 2
    while (pieces := receive(sys.stdin.buffer)) is not None:
        found = []
        try:
            for piece in pieces:
                found.append(tokenizer.encode_piece(piece).astype(dtype))
        except Unfit as why:
            facts = {"piece": len(found), "reason": why.reason, "at": why.at}
            send(answers, b"unfit", json.dumps(facts).encode())
            continue
        counts = np.array([len(ids) for ids in found], np.int64)
        send(answers, b"ids", counts.tobytes(), b"".join(ids.tobytes() for ids in found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
