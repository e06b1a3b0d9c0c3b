"""Disturbs a small run, and compares its end with that of a run that nobody disturbed.

  python benchmarks/chaos.py --minutes=3
  python benchmarks/chaos.py --rounds=10 --only=kill --seed=7

What happens to the process, at random times: SIGKILL; SIGTERM; SIGSTOP for some seconds; no file
may grow any more, as on a full disk; SIGKILL and then some bytes of its newest checkpoint change.
Each time the same command goes on. At the end both runs have the same fingerprint of every array,
every step once in metrics.jsonl, and no process has ended in another way than it should; else the
exit code is 1.
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

EVERY = 100  # steps between checkpoints
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
    f"--config.train.checkpoint_every={EVERY}",
    "--config.train.keep_checkpoints=3",
    "--config.train.eval_every=0",
)
ENDLESS = 1_000_000


class Run:
    """A run in `workdir` that is started again and again."""

    def __init__(self, workdir: Path, corpus: Path):
        self.workdir, self.log = workdir, workdir.with_suffix(".log")
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
        """Starts, and waits for the first line that it adds."""
        before = self.last_step()
        # Through a pipe: what it says is not on the disk that is full.
        with open(self.log, "a") as log:
            writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        self.process = subprocess.Popen(
            [*self.command, f"--config.train.steps={steps}"],
            stdout=writer.stdin,
            stderr=writer.stdin,
        )
        writer.stdin.close()
        while self.process.poll() is None and self.last_step() <= before:
            before = min(before, self.last_step())
            time.sleep(0.05)

    def wait(self, seconds: float = 90) -> int:
        return self.process.wait(timeout=seconds)

    def lines(self) -> list[dict]:
        """Whole lines of metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def last_step(self) -> int:
        return max((line["step"] for line in self.lines()), default=-1)

    def saved(self) -> list[int]:
        """Steps of complete checkpoints."""
        folder = self.workdir / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())

    def fingerprints(self, step: int) -> dict:
        file = self.workdir / "checkpoints" / str(step) / "manifest" / "metadata"
        return json.loads(file.read_text())["arrays"]


def kill(run: Run, rng: random.Random) -> str:
    """SIGKILL; what it costs is the steps since the last checkpoint."""
    run.process.kill()
    run.wait()
    return f"{run.last_step() - max(run.saved(), default=0)} steps lost"


def stop(run: Run, rng: random.Random) -> str:
    """SIGTERM, which saves and ends with 42."""
    run.process.terminate()
    code = run.wait()
    assert code == 42, f"SIGTERM ended with {code}, not 42"
    return "saved"


def freeze(run: Run, rng: random.Random) -> str:
    """SIGSTOP and, later, SIGCONT; nothing comes of it."""
    run.process.send_signal(signal.SIGSTOP)
    seconds = rng.uniform(0.2, 3)
    time.sleep(seconds)
    run.process.send_signal(signal.SIGCONT)
    return f"{seconds:.1f} s"


def full(run: Run, rng: random.Random) -> str:
    """No file can grow; it ends with a message, code 2."""
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    code = run.wait()
    assert code == 2, f"a full disk ended with {code}, not 2"
    return "ended with a message"


def flip(run: Run, rng: random.Random) -> str:
    """SIGKILL, and some bytes of a file of the newest checkpoint change."""
    kill(run, rng)
    steps = run.saved()
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


EVENTS = {"kill": kill, "term": stop, "stop": freeze, "full": full, "flip": flip}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--rounds", type=int, help="so many events, instead of --minutes")
    parser.add_argument("--only", choices=EVENTS, help="one kind of event")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    options = parser.parse_args()
    print(f"seed {options.seed}: --seed={options.seed} does the same again", flush=True)
    rng, events = random.Random(options.seed), [options.only] if options.only else list(EVENTS)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QKVJAX_DATA_DIR"] = f"{folder}/prepared"
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("To be, or not to be, that is the question. " * 200)
        run = Run(Path(folder) / "disturbed", corpus)
        began, done = time.monotonic(), 0
        run.start()

        def over() -> bool:
            if options.rounds:
                return done == options.rounds
            return time.monotonic() - began >= 60 * options.minutes

        while not over():
            time.sleep(rng.uniform(0, 2))
            event, done = rng.choice(events), done + 1
            try:
                came_of_it = EVENTS[event](run, rng)
            except AssertionError:
                print(run.log.read_text()[-5000:])
                raise
            print(f"step {run.last_step():>6}  {event}: {came_of_it}", flush=True)
            if run.process.poll() is not None:
                run.start()
        stop(run, rng)
        told = run.log.read_text()
        last = run.saved()[-1]
        calm = Run(Path(folder) / "calm", corpus)
        calm.start(last)
        assert calm.wait(600) == 0, calm.log.read_text()[-2000:]
        steps = [line["step"] for line in run.lines()]
        verdict = {
            "no traceback": "Traceback" not in told,
            "same fingerprints": run.fingerprints(last) == calm.fingerprints(last),
            "each step once": steps == sorted(set(steps)),
        }
        if not all(verdict.values()):
            print(told[told.find("Traceback") - 1000 :][:5000])
        resumed, damaged = map(told.count, ("resumed after", "is damaged and passed over"))
        print(
            f"{done} events, {last} steps; {resumed} times resumed, {damaged} damaged checkpoints"
        )
        print("  ".join(f"{name}: {'yes' if held else 'NO'}" for name, held in verdict.items()))
    return 0 if all(verdict.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
