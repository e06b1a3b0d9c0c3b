"""Times a train step of qkvjax against the same model in plain PyTorch, in one run.

  python benchmarks/torch_twin.py --size=shakespeare --torch_python=/path/to/python-with-torch
  python benchmarks/torch_twin.py --size=124m --dtype=bfloat16 --compile=1

Each side is a process. In every round they run one after the other while the others wait, so that
all see the same machine. The ratio is ours over torch's, with a 95 % interval over rounds. PyTorch
is not a dependency: `pip install torch`, here or for the interpreter of --torch_python.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 25
SECONDS = 1.0  # of a round of one side, about


def serve(call, wait) -> None:
    """Times `call` once for each line on stdin, and prints the seconds of one call.

    Args:
      call: starts a step and returns its result.
      wait: waits for a result.
    """
    wait(call())
    began = time.perf_counter()
    wait(call())
    repetitions = max(3, round(SECONDS / (time.perf_counter() - began)))
    print(json.dumps({"ready": repetitions}), flush=True)
    for _ in sys.stdin:
        # A call that is not timed: the other processes have replaced what was in the caches.
        wait(call())
        began = time.perf_counter()
        for _ in range(repetitions):
            result = call()
        wait(result)
        print((time.perf_counter() - began) / repetitions, flush=True)


def serve_ours(size: str, dtype: str, keep_memory: bool) -> None:
    """Serves the train step of qkvjax."""
    import jax
    from ours import train_call
    from sizes import SIZES

    from qkvjax.parallel import host

    if keep_memory:
        host.keep_freed_memory()
    call, _ = train_call(SIZES[size], "q-k-v", dtype)
    serve(call, jax.block_until_ready)


def serve_torch(size: str, dtype: str, compiled: bool) -> None:
    """Serves the train step of the twin."""
    import torch
    from sizes import SIZES
    from torch_model import train_call

    def wait(loss) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    serve(train_call(SIZES[size], dtype, compiled), wait)


class Worker:
    """A process that runs `serve` for one side.

    Args:
      python: interpreter.
      arguments: command line of this script in that process.
    """

    def __init__(self, python: str, *arguments: str):
        command = [python, str(Path(__file__).resolve()), *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if not self.process.stdout.readline():
            self.process.wait()
            raise SystemExit(f"error: {' '.join(command)} ended; the lines above say why")

    def time_step(self) -> float:
        """Returns the seconds of one step, measured now."""
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

    options = arguments(
        __doc__, size="shakespeare", dtype="float32", compile=0, torch_python=sys.executable
    )
    version = subprocess.run(
        [options.torch_python, "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        text=True,
    )
    if version.returncode:
        print(
            f"error: {options.torch_python} has no PyTorch: pip install torch, or name an"
            " interpreter that has it with --torch_python",
            file=sys.stderr,
        )
        return 2
    common = (options.size, options.dtype)
    workers = {
        "ours": Worker(sys.executable, "serve", "ours", *common, "1"),
        "ours, freed memory returned": Worker(sys.executable, "serve", "ours", *common, "0"),
        "torch": Worker(options.torch_python, "serve", "torch", *common, str(options.compile)),
    }
    for worker in workers.values():
        worker.time_step()  # does not count: the heap of our side grows for dozens of steps
    rounds = [{name: worker.time_step() for name, worker in workers.items()} for _ in range(ROUNDS)]
    for worker in workers.values():
        worker.close()
    seconds = {name: [times[name] for times in rounds] for name in workers}
    size = SIZES[options.size]
    for name, times in seconds.items():
        median = sorted(times)[len(times) // 2]
        record(
            options.output,
            benchmark="torch_twin",
            size=options.size,
            dtype=options.dtype,
            side=name,
            torch=version.stdout.strip(),
            torch_compile=bool(options.compile),
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
