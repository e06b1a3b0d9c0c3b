"""Prepares a gigabyte of text in a process whose memory is watched."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

GIGABYTE = 10**9
MAX_BYTES = 700e6  # of the process; TFDS, numpy and the tokenizer take 200 MB of them
PROGRAM = """
import sys
from qkvjax.data.dataset import prepare

data = prepare(*sys.argv[1:3], 1024, log=lambda line: print(line, file=sys.stderr, flush=True))
print(data.num_documents, len(data.train), len(data.validation))
"""


def write_documents(path, num_bytes):
    """Writes lines of jsonl with documents of 1 to 8 kB, all different; returns bytes of text."""
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfglmnprst" for b in ("a", "e", "io", "u", "an", "er")]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(40_000)]
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]
    text = " ".join(rng.choices(vocabulary, weights, k=3_000_000))
    written = 0
    count = 0
    with open(path, "w") as file:
        while written < num_bytes:
            start = rng.randrange(len(text) - 8000)
            document = f"{count} {text[start : start + rng.randint(1000, 8000)]}"
            file.write(json.dumps({"text": document}) + "\n")
            written += len(document)
            count += 1
    return written


@dataclasses.dataclass
class Memory:
    """Bytes in memory that do not belong to a file.

    Attributes:
      process: of the process that prepares.
      children: of the processes that tokenise for it.
    """

    process: int
    children: int


def memory_of(process):
    """Returns the memory of a process and its children; 0 for those that have ended."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    except OSError:
        children = []
    return Memory(anonymous_bytes(process.pid), sum(map(anonymous_bytes, children)))


def anonymous_bytes(pid):
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    kilobytes = [line.split()[1] for line in lines if line.startswith("RssAnon")]
    return 1024 * sum(map(int, kilobytes))


def prepare_watched(source, tokenizer, folder):
    """Prepares a corpus in another process.

    Returns:
      (seconds, samples of its memory in order, stdout, stderr).
    """
    environment = os.environ | {
        "QKVJAX_DATA_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), source, tokenizer],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    outputs = []
    reader = threading.Thread(target=lambda: outputs.append(process.communicate()))
    reader.start()
    samples = []
    while process.poll() is None:
        samples.append(memory_of(process))
        time.sleep(0.1)
    reader.join()
    seconds = time.monotonic() - began
    [(out, err)] = outputs
    assert process.returncode == 0, err
    return seconds, samples, out, err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_a_gigabyte_in_flat_memory(tmp_path, request, data_folder, kind):
    tokenizer = f"bpe:{request.getfixturevalue('bpe')}" if kind == "bpe" else "bytes"
    path = tmp_path / "large.jsonl"
    num_bytes = write_documents(path, GIGABYTE)
    seconds, samples, out, err = prepare_watched(f"jsonl:{path}", tokenizer, data_folder)
    early = max(memory.process for memory in samples[: len(samples) // 3])
    peak = max(memory.process for memory in samples)
    with_children = max(memory.process + memory.children for memory in samples)
    print(
        f"{kind}: {num_bytes / 1e6:,.0f} MB in {seconds:.0f} s, {num_bytes / 1e6 / seconds:.1f}"
        f" MB/s; memory at most {early / 1e6:.0f} MB in the first third, {peak / 1e6:.0f} MB in"
        f" all, {with_children / 1e6:.0f} MB with the processes that tokenise; {out.strip()}"
    )
    assert peak < MAX_BYTES and peak < 1.5 * early + 100e6
    assert "left" in err or seconds < 40
    path.unlink()
