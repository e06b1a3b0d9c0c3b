"""A train step of ours against the same model in plain PyTorch, in one run.

  python benchmarks/torch_twin.py --size=shakespeare --torch_python=/path/to/python-with-torch
  python benchmarks/torch_twin.py --size=124m --dtype=bfloat16 --compile=1

Two processes, one a framework, take turns round by round while the other waits, so that both
see the same machine; the ratio is ours over torch's, with a 95 % interval over rounds. PyTorch
is no dependency: `pip install torch`, here or for the interpreter of --torch_python.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 25
SECONDS = 1.0


def serve(call, wait) -> None:
    """Times `call` for each line on stdin and answers with seconds a call.

    One call before goes untimed: the other processes have had the caches meanwhile.
    """
    wait(call())
    began = time.perf_counter()
    wait(call())
    times = max(3, round(SECONDS / (time.perf_counter() - began)))
    print(json.dumps({"ready": times}), flush=True)
    for _ in sys.stdin:
        wait(call())
        began = time.perf_counter()
        for _ in range(times):
            result = call()
        wait(result)
        print((time.perf_counter() - began) / times, flush=True)


def serve_ours(size: str, dtype: str, keep_memory: bool) -> None:
    """Our train step."""
    import jax
    from ours import train_call
    from sizes import SIZES

    from qkvjax.parallel import host

    if keep_memory:
        host.keep_freed_memory()
    call, _ = train_call(SIZES[size], "q-k-v", dtype)
    serve(call, jax.block_until_ready)


def serve_torch(size: str, dtype: str, compiled: bool) -> None:
    """The twin's train step."""
    import torch
    from sizes import SIZES
    from torch_model import train_call

    call = train_call(SIZES[size], dtype, compiled)
    serve(call, lambda loss: torch.cuda.synchronize() if torch.cuda.is_available() else None)


class Worker:
    """A process that answers each `ask` with the seconds of one step."""

    def __init__(self, python: str, *arguments: str):
        command = [python, str(Path(__file__).resolve()), *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if not self.process.stdout.readline():
            self.process.wait()
            raise SystemExit(f"error: {' '.join(command)} ended; the lines above say why")

    def ask(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> int:
    from ours import arguments, record
    from sizes import SIZES

    from qkvjax.costs.measure import ratio

    given = arguments(
        __doc__, size="shakespeare", dtype="float32", compile=0, torch_python=sys.executable
    )
    asked = subprocess.run(
        [given.torch_python, "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        text=True,
    )
    if asked.returncode:
        print(
            f"error: {given.torch_python} has no PyTorch: pip install torch, or name an interpreter"
            " that has it with --torch_python",
            file=sys.stderr,
        )
        return 2
    common = (given.size, given.dtype)
    workers = {
        "ours": Worker(sys.executable, "serve", "ours", *common, "1"),
        "ours, freed memory returned": Worker(sys.executable, "serve", "ours", *common, "0"),
        "torch": Worker(given.torch_python, "serve", "torch", *common, str(given.compile)),
    }
    for worker in workers.values():
        worker.ask()  # a round untimed: the heap of our side grows for some dozens of steps
    rounds = [{name: worker.ask() for name, worker in workers.items()} for _ in range(ROUNDS)]
    for worker in workers.values():
        worker.close()
    seconds = {name: [times[name] for times in rounds] for name in workers}
    size = SIZES[given.size]
    for name, times in seconds.items():
        median = sorted(times)[len(times) // 2]
        record(
            given.output,
            benchmark="torch_twin",
            size=given.size,
            dtype=given.dtype,
            side=name,
            torch=asked.stdout.strip(),
            torch_compile=bool(given.compile),
            step_seconds=median,
            tokens_per_second=size.batch * size.length / median,
            ratio_to_torch=ratio(times, seconds["torch"]),
        )
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        side, size, dtype, option = sys.argv[2:]
        {"ours": serve_ours, "torch": serve_torch}[side](size, dtype, option == "1")
    else:
        sys.exit(main())
