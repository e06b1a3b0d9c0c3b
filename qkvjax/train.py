"""Train one model; go on by itself when the workdir has a checkpoint.

  qkvjax train --config=configs/lm.py:depth=2 --workdir=runs/first
  qkvjax train --config=configs/lm.py:depth=4,sharing=q-k=v --workdir=runs/tied \\
      --config.data.source=text:my_folder --config.train.steps=2ep
  qkvjax train --config=configs/lm.py:depth=8 --dry_run      the cost table, and stop

The workdir gets config.json, metrics.jsonl, checkpoints/STEP/, TensorBoard events and
run.json. SIGINT and SIGTERM save and end the run, SIGUSR1 saves and goes on. A step whose loss or
gradient is no finite number changes nothing; many in a row go back to the newest intact checkpoint
and leave their data out (rollbacks.jsonl). Exit codes: 0 done, 2 bad input, 42 preempted and saved
(SIGTERM), 43 stalled, 44 diverged, 45 no intact checkpoint, 130 interrupted and saved.

One command on each host trains over all of them: the processes find each other on TPU, SLURM,
Open MPI and Kubernetes, elsewhere by --coordinator, --num_processes and --process_id. The workdir
is then a folder that all of them see, and a signal to one of them counts for all.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from qkvjax import cli
from qkvjax.parallel import distributed, host

FLAGS = {
    "workdir": (str, None, "where the run is kept"),
    "dry_run": (bool, False, "print the cost table and stop"),
    "stall_seconds": (int, 1800, "without progress for so long it ends with stack traces; 0: never",
                      0),
    **cli.ATTENTION,
    **distributed.FLAGS,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(argv, __doc__, FLAGS, body, config="required", fields=True)


def body(values: flags.FlagValues) -> int:
    if values.dry_run:
        train(values.config, None)
        return 0
    from qkvjax.training.watchdog import watchdog

    host.keep_freed_memory()  # before jax starts
    with (
        distributed.job(values),
        watchdog(values.stall_seconds, start=values.init_seconds) as alive,
    ):
        _train_in(values.workdir, values.config, alive)
    return 0


def _train_in(folder: str | None, config, alive: Callable[[], None]) -> None:
    from qkvjax.errors import UserError
    from qkvjax.training.run import open_workdir

    there = distributed.first(lambda: folder is not None and Path(folder).exists())
    workdir = distributed.together(lambda: open_workdir(folder))
    try:
        train(config, workdir, alive=alive)
    except UserError:
        if distributed.is_first() and not there and not any(workdir.iterdir()):
            workdir.rmdir()  # a refused run leaves nothing
        raise


def train(
    config, workdir: Path | None, log: Callable[[str], None] = print,
    alive: Callable[[], None] = lambda: None,
) -> dict:  # fmt: skip
    """Trains to the end of `config`, from the newest intact checkpoint in `workdir` if any.

    Args:
      config: the configuration.
      workdir: None only prints the cost table.
      log: gets every line, on process 0.
      alive: called at each sign of progress.

    Returns:
      The summary: step, seconds, and the last evaluation ("eval/bits_per_byte", ...).
    """
    host.keep_freed_memory()
    import jax

    from qkvjax import config as configs
    from qkvjax.evaluation.evaluators import make_evaluators
    from qkvjax.parallel.mesh import find_devices, idle_devices
    from qkvjax.training import guard, loop, resume
    from qkvjax.training.checkpoint import Checkpoints, check_copies
    from qkvjax.training.metrics import Metrics, append_line, check_wandb, read_lines, write_json
    from qkvjax.training.report import cost_table, goodput
    from qkvjax.training.run import check_workdir, only_one, prepare_run
    from qkvjax.training.signals import requests
    from qkvjax.training.workdir import keep_tokenizer

    # ---- data, model, mesh ------------------------------------------------------------------
    started = time.perf_counter()
    first, together, is_first = distributed.first, distributed.together, distributed.is_first()
    log = log if is_first else lambda line: None
    fields = configs.flatten(configs.to_dict(config))
    distributed.check_alike(lambda: fields | distributed.program())
    together(lambda: check_wandb(config.train.wandb))
    if idle := idle_devices(config.mesh, len(together(find_devices))):
        log(idle)
    run = together(lambda: prepare_run(config, log=log))
    distributed.check_alike(lambda: {"the data's digest": run.dataset.digest})
    log(cost_table(run))
    if workdir is None:
        return {}
    first(lambda: check_workdir(workdir, config, run.dataset.digest))

    with contextlib.ExitStack() as held, requests() as asked, jax.set_mesh(run.mesh):
        first(lambda: held.enter_context(only_one(workdir)))
        # ---- state: restored or new -------------------------------------------------------------
        now, steps = resume.surroundings(run.mesh, config.train.compute_dtype), run.durations.steps
        checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep_checkpoints, now)
        held.callback(checkpoints.close)
        evaluators = together(lambda: make_evaluators(config, run.dataset, run.mesh))
        account, needed = workdir / "rollbacks.jsonl", {"step": int, "to": int, "skip": int}
        rollbacks = first(lambda: read_lines(account, **needed, reason=str))

        def begin():
            """(state, step): of the newest intact checkpoint, or before the first step."""
            if not checkpoints.steps():
                return run.init(), 0
            state, done = together(lambda: checkpoints.restore(run.abstract, log=log))
            checkpoints.set_aside(after=done, log=log)
            likeness = resume.continuation(checkpoints.surroundings(done), now)
            log(f"resumed after step {done} of {steps}, {likeness}")
            return state, done

        state, done = begin()
        lines = read_lines(workdir / "metrics.jsonl", step=int)
        earlier = [line for line in lines if line["step"] <= done]
        if done >= steps:
            log(f"nothing left to train: {workdir} is at step {done} of {steps}")
            return earlier[-1] if earlier else {"step": done}
        if hasattr(run.dataset, "tokenizer"):
            fingerprint = run.dataset.tokenizer.fingerprint
            first(lambda: keep_tokenizer(workdir, config.data.tokenizer, fingerprint))
        first(lambda: write_json(workdir / "config.json", configs.to_dict(config)))

        # ---- compile ----------------------------------------------------------------------------
        began = time.perf_counter()
        train_step = run.compile_step(state)
        checkpoints.prepare(state)
        compile_seconds = time.perf_counter() - began
        log(f"compiled in {compile_seconds:.1f} s")
        counts = ("num_documents", "num_train_tokens", "num_validation_tokens")
        described = {n: getattr(run.dataset, n) for n in ("description", "digest", *counts)}
        peak = getattr(train_step.memory_analysis(), "peak_memory_in_bytes", None)
        facts = {
            "environment": host.environment(), "costs": costs(run),
            "data": {"source": config.data.source} | described,
            "compile_seconds": compile_seconds, "peak_bytes": peak,
        }  # fmt: skip
        first(lambda: write_json(workdir / "run.json", facts))

        # ---- train ------------------------------------------------------------------------------
        while True:
            metrics = Metrics(workdir, done, configs.to_dict(config)) if is_first else None
            try:
                state, summary = loop.fit(
                    run, state, train_step,
                    make_batch=lambda step: run.batch(guard.data_step(step, rollbacks)),
                    evaluators=evaluators, checkpoints=checkpoints, metrics=metrics,
                    seconds=earlier[-1]["seconds"] if earlier else 0.0, requests=asked, alive=alive,
                    check=check_copies, log=log,
                )  # fmt: skip
                break
            except guard.Rollback as back:
                del state  # its arrays were given away
                checkpoints.wait()
                if len(rollbacks) >= guard.MOST_ROLLBACKS:
                    raise guard.Diverged(rollbacks) from None
                state, done = begin()
                line = back.line(to=done)
                first(lambda line=line: append_line(account, line))
                rollbacks.append(line)
                log(f"rolled back: {guard.told(line)}")
                earlier = [line for line in earlier if line["step"] <= done]
            finally:
                if metrics is not None:
                    metrics.close()
    before = earlier[-1]["seconds"] if earlier else 0.0
    log(goodput(summary, time.perf_counter() - started, compile_seconds, before))
    if summary["step"] < steps:
        log(
            f"stopped early: {workdir} is at step {summary['step']} of {steps}"
            f" (train.max_seconds={config.train.max_seconds:g}): the same command goes on"
        )
    else:
        log(f"done: {workdir}")
    return summary


def costs(run) -> dict:
    """The exact costs of a run's model, for run.json and the results of a study."""
    seq_len = run.config.data.seq_len
    return {
        "num_params": run.spec.num_params, "forward_macs": run.spec.forward_macs(seq_len),
        "seq_len": seq_len, "train_flops_per_token": run.train_flops_per_token,
        "cache_bytes_per_token": run.spec.cache_bytes_per_token("bfloat16"),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
