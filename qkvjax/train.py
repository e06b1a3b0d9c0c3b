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
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from qkvjax import cli
from qkvjax.parallel import distributed, folders, host, xla_flags

FLAGS = {
    "workdir": (str, None, "where the run is kept"),
    "dry_run": (bool, False, "print the cost table and stop"),
    "stall_seconds": (
        int,
        1800,
        "without progress for so long it ends with stack traces; 0: never",
        0,
    ),
    "profile_steps": (
        list,
        [],
        "FIRST,STOP: steps FIRST to STOP - 1 leave a trace for xprof in WORKDIR/profile",
    ),
    **cli.ATTENTION,
    **distributed.FLAGS,
}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(argv, __doc__, FLAGS, body, config="required", fields=True)


def body(values: flags.FlagValues) -> int:
    if values.dry_run:
        train(values.config, None)
        return 0
    from qkvjax.training.watchdog import watchdog

    profile_steps = parse_profile_steps(values.profile_steps)
    host.keep_freed_memory()  # before jax starts
    with (
        distributed.job(values),
        watchdog(values.stall_seconds, start=values.init_seconds) as alive,
    ):
        _train_in(values.workdir, values.config, alive=alive, profile_steps=profile_steps)
    return 0


def parse_profile_steps(words: Sequence[str]) -> tuple[int, int] | None:
    """(first, stop) of --profile_steps=FIRST,STOP; None where the flag is not given."""
    from qkvjax.errors import UserError

    if not words:
        return None
    if len(words) == 2 and all(word.strip().isdecimal() for word in words):
        first, stop = (int(word) for word in words)
        if 1 <= first < stop:
            return first, stop
    raise UserError(
        f"--profile_steps={','.join(words)}: write FIRST,STOP with 1 <= FIRST < STOP, as 10,13 for"
        " the steps 10, 11 and 12"
    )


def _train_in(folder: str | None, config, **options) -> None:
    from qkvjax.errors import UserError
    from qkvjax.training.run import open_workdir

    there = distributed.first(lambda: folder is not None and Path(folder).exists())
    workdir = distributed.together(lambda: open_workdir(folder))
    try:
        train(config, workdir, **options)
    except UserError:
        if distributed.is_first() and not there:
            _remove_unused(workdir)  # a refused run leaves nothing
        raise


def _remove_unused(workdir: Path) -> None:
    """Removes a workdir in which nothing but its lock was made."""
    names = {path.name for path in workdir.iterdir()}
    if names <= {".lock"}:
        for name in names:
            (workdir / name).unlink()
        workdir.rmdir()


def train(
    config,
    workdir: Path | None,
    log: Callable[[str], None] = print,
    alive: Callable[..., None] = lambda starting=False: None,
    profile_steps: tuple[int, int] | None = None,
) -> dict:
    """Trains to the end of `config`, from the newest intact checkpoint in `workdir` if any.

    Args:
      config: the configuration.
      workdir: None only prints the cost table.
      log: gets every line, on process 0.
      alive: called at each sign of progress, with starting=True before the first step.
      profile_steps: (first, stop): the steps from first on and before stop leave a trace.

    Returns:
      The summary: step, seconds, and the last evaluation ("eval/bits_per_byte", ...).
    """
    host.keep_freed_memory()
    import jax

    from qkvjax import config as configs
    from qkvjax import kernels
    from qkvjax.data.store import data_folder
    from qkvjax.evaluation.evaluators import compile_evaluators, make_evaluators
    from qkvjax.parallel.mesh import find_devices, idle_devices
    from qkvjax.progress import working
    from qkvjax.training import guard, loop, resume
    from qkvjax.training.checkpoint import Checkpoints, check_copies
    from qkvjax.training.fits import check_arrays, compile_all, peak_bytes
    from qkvjax.training.init_from import growth_note, start_from
    from qkvjax.training.metrics import Metrics, append_line, check_wandb, read_lines, write_json
    from qkvjax.training.report import cost_table, goodput
    from qkvjax.training.run import check_workdir, only_one, open_data, prepare_run, steps_of
    from qkvjax.training.signals import requests
    from qkvjax.training.workdir import keep_tokenizer

    # ---- data, model, mesh ------------------------------------------------------------------
    started = time.perf_counter()
    first, together, is_first = distributed.first, distributed.together, distributed.is_first()
    log = log if is_first else lambda line: None
    fields = configs.flatten(configs.to_dict(config))
    chosen = {"--attention": kernels.preferred, "XLA's flags": xla_flags.in_force()}
    distributed.check_alike(lambda: fields | distributed.program() | chosen)
    together(lambda: check_wandb(config.train.wandb))
    if idle := idle_devices(config.mesh, len(together(find_devices))):
        log(idle)
    starting = functools.partial(alive, starting=True)
    folder = together(data_folder) if distributed.several() else None
    dataset = folders.by_folder(folder, lambda sign: open_data(config, log, sign), starting)
    run = together(lambda: prepare_run(config, dataset=dataset, log=log))
    distributed.check_alike(lambda: {"the data's digest": run.dataset.digest})
    log(cost_table(run))
    if workdir is None:
        return {}
    first(lambda: check_workdir(workdir, config, run.dataset.digest))
    before = first(lambda: saved_config(workdir))

    with contextlib.ExitStack() as held, requests() as asked, jax.set_mesh(run.mesh):
        first(lambda: held.enter_context(only_one(workdir)))
        # ---- state: restored, another run's, or new ---------------------------------------------
        now, steps = resume.surroundings(run), run.durations.steps
        checkpoints = Checkpoints(
            workdir / "checkpoints",
            config.train.keep_checkpoints,
            now,
            keep_every=run.durations.keep_every,
        )
        held.callback(checkpoints.close)
        evaluators = together(lambda: make_evaluators(config, run.dataset, run.mesh, workdir))
        account, needed = workdir / "rollbacks.jsonl", {"step": int, "to": int, "skip": int}
        rollbacks = first(lambda: read_lines(account, **needed, reason=str))

        def begin():
            """(state, step): of the newest intact checkpoint, or before the first step."""
            with working("restoring", log=log, alive=alive):
                if not checkpoints.steps():
                    return start_from(run, log) if config.train.init_from else (run.init(), 0)
                state, done = together(lambda: checkpoints.restore(run.abstract, log=log))
            checkpoints.set_aside(after=done, log=log)
            likeness = resume.continuation(checkpoints.surroundings(done), now)
            log(f"resumed after step {done} of {steps}, {likeness}")
            return state, done

        remedy = "set mesh.fsdp=-1, which shares it out over all devices, or take more devices"
        together(lambda: check_arrays("the train state", run.abstract, remedy))
        state, done = begin()
        lines = first(lambda: read_lines(workdir / "metrics.jsonl", step=int))
        earlier = [line for line in lines if line["step"] <= done]
        if before is not None:
            old = configs.from_dict(before)
            if note := growth_note(old, config, done, lambda value: steps_of(run, value)):
                log(note)
        if done >= steps and not loop.is_unscored(earlier, done, run, evaluators):
            log(f"nothing left to train: {workdir} is at step {done} of {steps}")
            return earlier[-1] if earlier else {"step": done}

        # ---- compile ----------------------------------------------------------------------------
        began = time.perf_counter()
        with working("compiling", log=log, alive=alive):
            average = run.abstract.average
            scored = run.abstract.model if average is None else average
            programs = together(
                lambda: compile_all(
                    {
                        "the train step": lambda: [run.compile_step(state)],
                        "the evaluation": lambda: compile_evaluators(evaluators, scored),
                    }
                )
            )
            checkpoints.prepare(state)
        [train_step] = programs["the train step"]
        compile_seconds = time.perf_counter() - began
        log(f"compiled in {compile_seconds:.1f} s")
        if hasattr(run.dataset, "tokenizer"):
            fingerprint = run.dataset.tokenizer.fingerprint
            first(lambda: keep_tokenizer(workdir, config.data.tokenizer, fingerprint))
        first(lambda: write_json(workdir / "config.json", configs.to_dict(config)))
        counts = ("num_documents", "num_train_tokens", "num_validation_tokens")
        described = {n: getattr(run.dataset, n) for n in ("description", "digest", *counts)}
        facts = {
            "environment": host.environment(),
            "costs": costs(run),
            "data": {"source": config.data.source} | described,
            "compile_seconds": compile_seconds,
            "peak_bytes": peak_bytes(train_step),
        }
        first(lambda: write_json(workdir / "run.json", facts))
        profile = None
        if profile_steps is not None:
            profile = loop.Profile(*profile_steps, str(workdir / "profile"))

        # ---- train ------------------------------------------------------------------------------
        while True:
            metrics = Metrics(workdir, done, configs.to_dict(config)) if is_first else None
            try:
                training = loop.Loop(
                    run,
                    state,
                    train_step,
                    make_batch=lambda step: run.batch(guard.data_step(step, rollbacks)),
                    evaluators=evaluators,
                    checkpoints=checkpoints,
                    metrics=metrics,
                    earlier=earlier,
                    requests=asked,
                    alive=alive,
                    check=check_copies,
                    profile=profile,
                    log=log,
                )
                state, summary = training.fit()
                break
            except guard.Rollback as back:
                del state, training  # the arrays were given away
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
    trained_before = earlier[-1]["seconds"] if earlier else 0.0
    log(goodput(summary, time.perf_counter() - started, compile_seconds, trained_before))
    if summary["step"] < steps:
        log(
            f"stopped early: {workdir} is at step {summary['step']} of {steps}"
            f" (train.max_seconds={config.train.max_seconds:g}): the same command goes on"
        )
    else:
        log(f"done: {workdir}")
    return summary


def saved_config(workdir: Path) -> dict | None:
    """The configuration with which a workdir was trained, or None."""
    from qkvjax import config as configs

    path = workdir / "config.json"
    return configs.to_dict(configs.load(path)) if path.exists() else None


def costs(run) -> dict:
    """The exact costs of a run's model, for run.json and the results of a study."""
    seq_len = run.config.data.seq_len
    return {
        "num_params": run.spec.num_params,
        "forward_macs": run.spec.forward_macs(seq_len),
        "seq_len": seq_len,
        "train_flops_per_token": run.train_flops_per_token,
        "cache_bytes_per_token": run.spec.cache_bytes_per_token("bfloat16"),
    }


if __name__ == "__main__":
    sys.exit(main())
