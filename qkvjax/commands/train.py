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

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from qkvjax.commands import cli
from qkvjax.config import resolve
from qkvjax.parallel import distributed, host, job

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
    **job.FLAGS,
}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(argv, __doc__, FLAGS, body, config="required", fields=True)


def body(values: flags.FlagValues) -> int:
    config = resolve(values.config)
    if values.dry_run:
        from qkvjax.training.train import train

        train(config, None)
        return 0
    from qkvjax.training.watchdog import watchdog

    profile_steps = parse_profile_steps(values.profile_steps)
    host.keep_freed_memory()  # before jax starts
    with (
        job.join(values),
        watchdog(values.stall_seconds, start=values.init_seconds) as alive,
    ):
        _train_in(values.workdir, config, alive=alive, profile_steps=profile_steps)
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
    from qkvjax.training.train import train
    from qkvjax.workdir import open_workdir

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
