"""Disturbs a small run at random, and compares its end with that of an undisturbed run.

  python benchmarks/chaos.py --minutes=3
  python benchmarks/chaos.py --rounds=10 --only=kill --seed=7

At random times one of these happens to the process: SIGKILL; SIGTERM; SIGSTOP for some seconds; no
file may grow any more, as on a full disk; SIGKILL, and then some bytes of the newest checkpoint
change. After each the same command is started again. The exit code is 0 if at the end all this
holds, else 1: both runs have the same fingerprint of every array, metrics.jsonl has every step
once, and no process ended in an unexpected way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKPOINT_EVERY = 100  # steps
FLAGS = (
    "--config=configs/lm.py:depth=1,sharing=q-k=v",
    "--config.model.d_model=32",
    "--config.model.num_heads=2",
    "--config.data.seq_len=32",
    "--config.data.batch_size=4",
    "--config.model.dropout=0.1",
    "--config.train.accumulation=2",
    "--config.optimizer.schedule=constant",
    "--config.optimizer.warmup_steps=20",
    "--config.train.log_every=20",
    f"--config.train.checkpoint_every={CHECKPOINT_EVERY}",
    "--config.train.keep_checkpoints=3",
    "--config.train.eval_every=0",
)
ENDLESS = 1_000_000  # steps
SAVED = 42  # exit code of a run that SIGTERM ended
BAD_INPUT = 2  # exit code of a run that could not write a file
END_OF_LOG = 5000  # characters


class Run:
    """A run in one workdir, which is started again and again.

    Args:
      workdir: of the run.
      corpus: text file to train on.
    """

    def __init__(self, workdir: Path, corpus: Path):
        self.workdir = workdir
        self.log = workdir.with_suffix(".log")
        self.command = [
            sys.executable,
            "-m",
            "qkvjax",
            "train",
            *FLAGS,
            f"--config.data.source=text:{corpus}",
            f"--workdir={workdir}",
        ]
        self.process = None

    def start(self, steps: int = ENDLESS) -> None:
        """Starts the process, and waits until it adds a line to metrics.jsonl or ends."""
        before = self.last_step()
        # Output goes through a pipe to another process, for which the disk is never full.
        with open(self.log, "a") as log:
            writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        self.process = subprocess.Popen(
            [*self.command, f"--config.train.steps={steps}"],
            stdout=writer.stdin,
            stderr=writer.stdin,
        )
        writer.stdin.close()
        while self.process.poll() is None and self.last_step() <= before:
            before = min(before, self.last_step())  # a restart removes steps after its checkpoint
            time.sleep(0.05)

    def wait(self, seconds: float = 90) -> int:
        """Waits for the process to end; returns its exit code."""
        return self.process.wait(timeout=seconds)

    def lines(self) -> list[dict]:
        """Returns the complete lines of metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def last_step(self) -> int:
        """Returns the last step in metrics.jsonl, -1 if there is none."""
        return max((line["step"] for line in self.lines()), default=-1)

    def saved_steps(self) -> list[int]:
        """Returns the steps of complete checkpoints."""
        folder = self.workdir / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())

    def fingerprints(self, step: int) -> dict:
        """Returns the fingerprint of each array in a checkpoint."""
        file = self.workdir / "checkpoints" / str(step) / "manifest" / "metadata"
        return json.loads(file.read_text())["arrays"]


def kill(run: Run, rng: random.Random) -> str:
    """Sends SIGKILL; the steps since the last checkpoint are lost."""
    run.process.kill()
    run.wait()
    return f"{run.last_step() - max(run.saved_steps(), default=0)} steps lost"


def terminate(run: Run, rng: random.Random) -> str:
    """Sends SIGTERM; the run saves a checkpoint and ends."""
    run.process.terminate()
    code = run.wait()
    assert code == SAVED, f"SIGTERM ended with {code}, not {SAVED}"
    return "saved"


def freeze(run: Run, rng: random.Random) -> str:
    """Sends SIGSTOP and, after a while, SIGCONT; the run continues."""
    run.process.send_signal(signal.SIGSTOP)
    seconds = rng.uniform(0.2, 3)
    time.sleep(seconds)
    run.process.send_signal(signal.SIGCONT)
    return f"{seconds:.1f} s"


def fill_disk(run: Run, rng: random.Random) -> str:
    """Lets no file grow any more; the run ends with a message."""
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    code = run.wait()
    assert code == BAD_INPUT, f"a full disk ended with {code}, not {BAD_INPUT}"
    return "ended with a message"


def flip_bits(run: Run, rng: random.Random) -> str:
    """Sends SIGKILL, and changes bits in a file of the newest checkpoint."""
    kill(run, rng)
    steps = run.saved_steps()
    if len(steps) < 2:
        return "nothing to damage yet"
    folder = run.workdir / "checkpoints" / str(steps[-1])
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    file = rng.choice(sorted(files))
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 20])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"{file.relative_to(run.workdir)}"


EVENTS = {
    "kill": kill,
    "term": terminate,
    "stop": freeze,
    "full": fill_disk,
    "flip": flip_bits,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--rounds", type=int, help="number of events, instead of --minutes")
    parser.add_argument("--only", choices=EVENTS, help="one kind of event")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    options = parser.parse_args()
    print(f"seed {options.seed}: --seed={options.seed} does the same again", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QKVJAX_DATA_DIR"] = f"{folder}/prepared"
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("To be, or not to be, that is the question. " * 200)
        disturbed = Run(Path(folder) / "disturbed", corpus)
        num_events = disturb(disturbed, options)
        last = disturbed.saved_steps()[-1]
        calm = Run(Path(folder) / "calm", corpus)
        calm.start(last)
        assert calm.wait(600) == 0, calm.log.read_text()[-2000:]
        return compare(disturbed, calm, num_events)


def disturb(run: Run, options: argparse.Namespace) -> int:
    """Runs and disturbs, ends with SIGTERM, and returns the number of events."""
    rng = random.Random(options.seed)
    events = [options.only] if options.only else list(EVENTS)
    num_events = 0
    began = time.monotonic()
    run.start()
    while not _is_over(options, num_events, time.monotonic() - began):
        time.sleep(rng.uniform(0, 2))
        event = rng.choice(events)
        num_events += 1
        try:
            outcome = EVENTS[event](run, rng)
        except AssertionError:
            print(run.log.read_text()[-END_OF_LOG:])
            raise
        print(f"step {run.last_step():>6}  {event}: {outcome}", flush=True)
        if run.process.poll() is not None:
            run.start()
    terminate(run, rng)
    return num_events


def _is_over(options: argparse.Namespace, num_events: int, seconds: float) -> bool:
    if options.rounds:
        return num_events == options.rounds
    return seconds >= 60 * options.minutes


def compare(disturbed: Run, calm: Run, num_events: int) -> int:
    """Prints how the disturbed run compares with the calm one; returns the exit code."""
    output = disturbed.log.read_text()
    last = disturbed.saved_steps()[-1]
    steps = [line["step"] for line in disturbed.lines()]
    checks = {
        "no traceback": "Traceback" not in output,
        "same fingerprints": disturbed.fingerprints(last) == calm.fingerprints(last),
        "each step once": steps == sorted(set(steps)),
    }
    passed = all(checks.values())
    if not passed:
        print(output[output.find("Traceback") - 1000 :][:END_OF_LOG])
    num_resumed = output.count("resumed after")
    num_damaged = output.count("is damaged and passed over")
    print(
        f"{num_events} events, {last} steps; {num_resumed} times resumed,"
        f" {num_damaged} damaged checkpoints"
    )
    print("  ".join(f"{name}: {'yes' if holds else 'NO'}" for name, holds in checks.items()))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
