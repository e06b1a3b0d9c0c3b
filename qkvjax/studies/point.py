"""One run of a study: trains a model, samples from it, and appends a line to results.jsonl."""

from __future__ import annotations

import math
from pathlib import Path

from qkvjax.errors import UserError
from qkvjax.files import append_line, read_json, read_lines
from qkvjax.studies.grid import Study
from qkvjax.studies.task import Task
from qkvjax.studies.tuning import TUNE
from qkvjax.training.guard import DIVERGED
from qkvjax.training.signals import Stopped

SAMPLE_TOKENS = 240
# Metrics of the last evaluation that a line repeats, if the evaluator has them.
_METRICS = (
    "perplexity",
    "num_bytes",
    "pad_fraction",
    "accuracy",
    "class_accuracy",
    "solved",
    "loss",
    "num_labels",
)


def train_point(study: Study, number: int) -> int:
    """Trains task `number` in this process and returns 0.

    A failure gets its line in results.jsonl before it is raised.

    Raises:
      UserError: the number is out of range, or the tuning runs that choose the value of this
        point are not finished.
    """
    if not 0 <= number < len(study):
        raise UserError(f"--point={number} is not one of 0 to {len(study) - 1}: see --list")
    task = study.task(number)
    if task.waits:
        raise UserError(_missing(study, task))
    if study.done([task]):
        take_over(study, [task])
        print(f"point {number} ({task.name}, seed {task.seed}) is finished")
        return 0
    try:
        append_line(study.results, _train(study, task))
    except Stopped:
        raise  # a checkpoint is saved: the next start continues this run
    except Exception as error:
        append_line(study.results, failure(study, task, f"{type(error).__name__}: {error}"))
        raise
    return 0


def _missing(study: Study, task: Task) -> str:
    """Returns an error message that names the tuning runs a task waits for."""
    runs = study.tuning_runs(task.label, task.setting)
    done = study.done(runs)
    missing = [
        f"{run.number} ({run.name}, seed {run.seed})" for run in runs if run.identity not in done
    ]
    return (
        f"--point={task.number} compares {task.label} at its best {study.tuning.field}, which is"
        f" not known yet: {len(missing)} of {len(runs)} tuning runs are not finished; first run"
        f" --point={', '.join(missing)}"
    )


def heading(study: Study, task: Task) -> dict:
    """Returns the first entries of every line about a run: which run of the study it is."""
    line = {
        "label": task.label,
        "setting": task.setting,
        "overrides": task.overrides,
        "seed": task.seed,
        "identity": task.identity,
        "data_digest": study.digest(task) or "",
        "workdir": task.folder,
    }
    return line | {"phase": task.phase, "tuned": task.value} if task.phase else line


def take_over(study: Study, tasks: list[Task]) -> None:
    """Appends lines under this study's names for runs that another study of the workdir finished.

    A tuning run is also a point of an ordinary study, which calls it "Q-K=V learning_rate=0.002".
    The identity is the same in both, so the run is not repeated.
    """
    done = study.done(tasks)
    for task in tasks:
        line = done.get(task.identity)
        if line and (line.get("label"), line.get("phase", "")) != (task.label, task.phase):
            renamed = heading(study, task)
            replaced = {*renamed, "phase", "tuned"}
            rest = {name: value for name, value in line.items() if name not in replaced}
            append_line(study.results, renamed | rest)


def failure(study: Study, task: Task, error: str) -> dict:
    """Returns the line of a run that failed."""
    return heading(study, task) | {"status": "failed", "error": error}


def _train(study: Study, task: Task) -> dict:
    """Trains a task and returns its line for results.jsonl."""
    from qkvjax.training.train import train

    folder = study.workdir / task.folder
    folder.mkdir(parents=True, exist_ok=True)
    summary = train(task.config, folder, log=lambda line: print(line, flush=True))
    run = read_json(folder / "run.json")
    metric = study.metric
    text = metric == "bits_per_byte"
    curve = [
        {name: line[name] for name in ("step", "tokens", "seconds")}
        | {metric: line[f"eval/{metric}"]}
        for line in read_lines(folder / "metrics.jsonl")
        if f"eval/{metric}" in line
    ]
    score = summary[f"eval/{metric}"]
    if score is None or not math.isfinite(score):
        raise UserError(
            f"training diverged: the score {score} is not finite; lower optimizer.learning_rate",
            code=DIVERGED,
        )
    return heading(study, task) | {
        "status": "done",
        "error": None,
        "metric": metric,
        "score": score,
        "train_score": summary.get(f"eval_train/{metric}"),
        **{name: summary[f"eval/{name}"] for name in _METRICS if f"eval/{name}" in summary},
        "tokenizer": task.config.data.tokenizer.partition(":")[0] if text else None,
        "score_pads": task.config.data.score_pads,
        "steps": summary["step"],
        "tokens": summary["step"] * task.config.data.batch_size * task.config.data.seq_len,
        "seconds": summary["seconds"],
        "curve": curve,
        "costs": run["costs"],
        **_inspect(study, task, folder, summary),
    }


def _inspect(study: Study, task: Task, folder: Path, summary: dict) -> dict:
    """Returns what the report shows of one model: a text sample, spectra, means of `inside`.

    Spectra come from the first seed in the first setting alone, samples from every language model.
    Tuning runs have neither.
    """
    from qkvjax.evaluation.inside import spectra_of
    from qkvjax.training.restore import load_model

    means = {
        name.removeprefix("inside/"): value
        for name, value in summary.items()
        if name.startswith("inside/")
    }
    views = {"sample": None, "inside": means or None, "spectra": None}
    first = task.seed == study.seeds[0] and task.setting == next(iter(study.settings))
    if task.phase == TUNE or (study.metric != "bits_per_byte" and not first):
        return views
    model, tokenizer, config, _ = load_model(folder)
    if tokenizer is not None:
        text = _sample(study, task, model, tokenizer, config)
        views["sample"] = {"prompt": study.prompt, "text": text}
    return views | {"spectra": spectra_of(model) if first else None}


def _sample(study: Study, task: Task, model, tokenizer, config) -> str:
    """Returns text that the model writes after the prompt of the study."""
    from qkvjax.generation.generate import continuation, generate, prompt_ids

    prompt = prompt_ids(tokenizer, study.prompt)[: config.data.seq_len - 1]
    room = config.data.seq_len - len(prompt) if model.spec.bounded else SAMPLE_TOKENS
    samples = generate(
        model,
        prompt,
        num_ids=tokenizer.num_ids,
        max_tokens=min(SAMPLE_TOKENS, room),
        temperature=0.8,
        seed=task.seed,
        dtype=config.train.compute_dtype,
    )
    return continuation(tokenizer, samples.ids[0])
