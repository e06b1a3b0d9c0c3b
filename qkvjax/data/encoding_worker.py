"""Tokenises for another process: pieces of documents come on stdin, their ids go to stdout.

  python -m qkvjax.data.encoding_worker TOKENIZER FINGERPRINT DTYPE

A message is a list of byte strings: their number, the length of each, then all of them. A request
is a list of pieces. The answer is b"ids", the number of ids of each piece (int64) and all ids; or
b"unencodable" and JSON. The process ends when its input ends.
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


def send(pipe: BinaryIO, *parts: bytes) -> None:
    """Writes one message, a list of byte strings."""
    pipe.write(_COUNT.pack(len(parts)))
    pipe.write(np.array([len(part) for part in parts], "<i8").tobytes())
    for part in parts:
        pipe.write(part)
    pipe.flush()


def receive(pipe: BinaryIO) -> list[bytes] | None:
    """Reads one message; None at the end of the pipe.

    Raises:
      EOFError: the pipe ends within a message.
    """
    head = pipe.read(_COUNT.size)
    if not head:
        return None
    (count,) = _COUNT.unpack(_require_length(head, _COUNT.size))
    lengths = np.frombuffer(_require_length(pipe.read(8 * count), 8 * count), "<i8").tolist()
    return [_require_length(pipe.read(length), length) for length in lengths]


def _require_length(data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise EOFError("the other process ended")
    return data


def main(spec: str, fingerprint: str, dtype: str) -> int:
    """Answers requests until stdin ends.

    Args:
      spec: `data.tokenizer`.
      fingerprint: of the tokenizer that the other process has.
      dtype: of the ids in the answers.

    Returns:
      The exit code; 2 if the tokenizer has another fingerprint.
    """
    from qkvjax.data.tokenizers import load_tokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process gets Ctrl-C too, and decides
    # Libraries may print to stdout, so answers get a copy of it, and stdout becomes stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    tokenizer = load_tokenizer(spec)
    if tokenizer.fingerprint != fingerprint:
        print(f"data.tokenizer={spec!r} changed while it was used", file=sys.stderr)
        return 2
    while (pieces := receive(sys.stdin.buffer)) is not None:
        send(answers, *_answer(tokenizer, pieces, dtype))
    return 0


def _answer(tokenizer, pieces: list[bytes], dtype: str) -> list[bytes]:
    """Returns the message with the ids of some pieces."""
    from qkvjax.data.unencodable import Unencodable

    encoded = []
    try:
        for piece in pieces:
            encoded.append(tokenizer.encode_piece(piece).astype(dtype))
    except Unencodable as error:
        facts = {"piece": len(encoded), "reason": error.reason, "position": error.position}
        return [b"unencodable", json.dumps(facts).encode()]
    counts = np.array([len(ids) for ids in encoded], np.int64)
    return [b"ids", counts.tobytes(), b"".join(ids.tobytes() for ids in encoded)]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
