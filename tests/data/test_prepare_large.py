"""A gigabyte of text, prepared in a process whose memory is watched."""

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
MOST = 700e6  # bytes of the process; TFDS, numpy and the tokenizer take 200 MB of them
PROGRAM = """
import sys
from qkvjax.data.dataset import prepare

data = prepare(*sys.argv[1:3], 1024, log=lambda line: print(line, file=sys.stderr, flush=True))
print(data.num_documents, len(data.train), len(data.validation))
"""


def write_documents(path, num_bytes):
    """Lines of jsonl with documents of 1 to 8 kB, all different; returns the bytes of text."""
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfglmnprst" for b in ("a", "e", "io", "u", "an", "er")]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(40_000)]
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]
    text = " ".join(rng.choices(vocabulary, weights, k=3_000_000))
    written = count = 0
    with open(path, "w") as file:
        while written < num_bytes:
            start = rng.randrange(len(text) - 8000)
            document = f"{count} {text[start : start + rng.randint(1000, 8000)]}"
            file.write(json.dumps({"text": document}) + "\n")
            written += len(document)
            count += 1
    return written


def resident(process):
    """(bytes of a process, bytes of it and its children) that are in memory and not of a file."""

    def anonymous(pid):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return 0
        kilobytes = [line.split()[1] for line in lines if line.startswith("RssAnon")]
        return 1024 * sum(map(int, kilobytes))

    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    except OSError:
        children = []
    own = anonymous(process.pid)
    return own, own + sum(map(anonymous, children))


def watched(source, tokenizer, folder):
    """(seconds, largest of `resident` in the first third and in all, stderr) of a preparation."""
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
        samples.append(resident(process))
        time.sleep(0.1)
    reader.join()
    assert process.returncode == 0, outputs[0][1]
    seconds = time.monotonic() - began
    early = max(own for own, _ in samples[: len(samples) // 3])
    return seconds, early, max(own for own, _ in samples), max(s for _, s in samples), outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_a_gigabyte_in_flat_memory(tmp_path, request, data_folder, kind):
    tokenizer = f"bpe:{request.getfixturevalue('bpe')}" if kind == "bpe" else "bytes"
    path = tmp_path / "large.jsonl"
    num_bytes = write_documents(path, GIGABYTE)
    seconds, early, peak, with_children, (out, err) = watched(
        f"jsonl:{path}", tokenizer, data_folder
    )
    print(
        f"{kind}: {num_bytes / 1e6:,.0f} MB in {seconds:.0f} s, {num_bytes / 1e6 / seconds:.1f}"
        f" MB/s; memory at most {early / 1e6:.0f} MB in the first third, {peak / 1e6:.0f} MB in"
        f" all, {with_children / 1e6:.0f} MB with the processes that tokenise; {out.strip()}"
    )
    assert peak < MOST and peak < 1.5 * early + 100e6
    assert "left" in err or seconds < 40
    path.unlink()
