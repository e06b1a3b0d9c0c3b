"""Where numbers go: `metrics.jsonl`, which is the truth, TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from qkvjax.errors import UserError
from qkvjax.files import append_line, read_lines, unwritable, write_lines
from qkvjax.training.tensorboard import Events

WANDB_SECONDS = 10  # how long its service may take to answer; it retries for about as long again


def check_wandb(project: str | None) -> None:
    """Raises UserError when a Weights & Biases project is named and the package is missing."""
    found = importlib.util.find_spec("wandb") if project else None
    if project and (found is None or found.origin is None):  # a folder of logs has no origin
        remedy = "pip install 'qkvjax[wandb]', or unset it"
        raise UserError(f"train.wandb needs Weights & Biases: {remedy}")


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers as JSON has them: NaN and infinity are None."""
    return {name: float(v) if math.isfinite(v) else None for name, v in values.items()}


def _start_wandb(project: str, workdir: Path, config: Mapping):
    """A run of Weights & Biases; one that is kept in the workdir where the service does not answer.

    A run must not wait for a service that only shows it, nor end because of it.
    """
    import wandb

    where = {"project": project, "dir": str(workdir), "config": config, "resume": "allow"}
    try:
        return wandb.init(**where, settings={"init_timeout": WANDB_SECONDS})
    except (wandb.Error, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    print(
        f"Weights & Biases does not answer ({reason[:200]}): the run goes on and keeps its record"
        f" in {workdir}/wandb, which `wandb sync` uploads later. WANDB_MODE=offline does so from"
        " the start; `wandb login` or WANDB_API_KEY gives the key",
        file=sys.stderr,
        flush=True,
    )
    os.environ["WANDB_MODE"] = "offline"  # also for what begins later in this process
    return wandb.init(**where, mode="offline")


class Metrics:
    """The metrics of one run.

    Args:
      workdir: where `metrics.jsonl` and the TensorBoard events go.
      start: the step the run goes on from; later lines, written before a crash, are dropped, so
        that no step stands twice.
      config: the resolved configuration, shown by Weights & Biases where it names a project.
    """

    def __init__(self, workdir: Path, start: int = 0, config: Mapping | None = None):
        self.path = workdir / "metrics.jsonl"
        kept = [record for record in read_lines(self.path, step=int) if record["step"] <= start]
        if self.path.exists():
            write_lines(self.path, kept)
        try:
            self._events = Events(workdir / "tensorboard", start)
        except OSError as error:
            raise unwritable(workdir / "tensorboard", error) from None
        self._wandb, project = None, config and config["train"]["wandb"]
        if project:
            self._wandb = _start_wandb(project, workdir, config)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of plain numbers; NaN and infinity are written as null."""
        append_line(self.path, {"step": step, **_plain(values)})
        self._show(step, values)

    def amend(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers to the last line, which is that of `step`, or writes a line of them.

        The file is replaced as a whole, so that it has each step once whatever happens.
        """
        lines = read_lines(self.path, step=int)
        if not lines or lines[-1]["step"] != step:
            lines.append({"step": step})
        lines[-1] |= _plain(values)
        write_lines(self.path, lines)
        self._show(step, values)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        """Sends numbers to TensorBoard and, where it is asked for, Weights & Biases."""
        plain = _plain(values)
        try:
            self._events.scalars(step, {k: v for k, v in plain.items() if v is not None})
        except OSError as error:
            raise unwritable(self.path.with_name("tensorboard"), error) from None
        if self._wandb:
            self._wandb.log(plain, step=step)

    def close(self) -> None:
        """Ends what is open."""
        self._events.close()
        if self._wandb:
            self._wandb.finish()
