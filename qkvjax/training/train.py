"""The training program: from a configuration to a trained model in a workdir."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax

from qkvjax import config as configs
from qkvjax.data.dataset_like import dataset_record
from qkvjax.data.store import data_folder
from qkvjax.evaluation.evaluators import compile_evaluators, make_evaluators
from qkvjax.fields import Config
from qkvjax.files import append_line, read_lines, write_json
from qkvjax.parallel import distributed, folders, host, xla_flags
from qkvjax.parallel.mesh import find_devices, idle_devices
from qkvjax.progress import working
from qkvjax.training import guard, loop, resume
from qkvjax.training.checkpoint import Checkpoints, check_copies
from qkvjax.training.cost_table import cost_table, goodput
from qkvjax.training.fits import check_arrays, compile_all, peak_bytes
from qkvjax.training.identity import check_workdir, keep_tokenizer
from qkvjax.training.init_from import growth_note, start_from
from qkvjax.training.metrics import Metrics, check_wandb
from qkvjax.training.run import open_data, prepare_run, steps_of
from qkvjax.training.signals import requests
from qkvjax.workdir import only_one


def train(
    config: Config,
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
    # ---- data, model, mesh ------------------------------------------------------------------
    started = time.perf_counter()
    first, together, is_first = distributed.first, distributed.together, distributed.is_first()
    log = log if is_first else lambda line: None
    fields = configs.flatten(configs.to_dict(config))
    chosen = {"XLA's flags": xla_flags.in_force()}
    distributed.check_alike(lambda: fields | distributed.program() | chosen)
    together(lambda: check_wandb(config.train.wandb))
    if idle := idle_devices(config.mesh.sizes, len(together(find_devices))):
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
            old = configs.resolve(configs.from_dict(before))
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
        if run.dataset.tokenizer is not None:
            fingerprint = run.dataset.tokenizer.fingerprint
            first(lambda: keep_tokenizer(workdir, config.data.tokenizer, fingerprint))
        first(lambda: write_json(workdir / "config.json", configs.to_dict(config)))
        facts = {
            "environment": host.environment(),
            "costs": costs(run),
            "data": {"source": config.data.source} | dataset_record(run.dataset),
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
