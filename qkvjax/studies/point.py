"""One run of a study: train, sample, and a line in results.jsonl."""

from __future__ import annotations

import math

from qkvjax.errors import UserError
from qkvjax.files import append_line, read_json, read_lines
from qkvjax.studies.grid import Study
from qkvjax.studies.task import Task
from qkvjax.studies.tuning import TUNE
from qkvjax.training.guard import DIVERGED
from qkvjax.training.signals import Stopped

SAMPLE_TOKENS = 240
# What a line says of its last evaluation: of text, of labels, of both.
_FACTS = (
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
    """Trains task `number` in this process; a failure is recorded before it is raised.

    Raises:
      UserError: no such point, or the tuning runs that choose its value are not finished.
    """
    if not 0 <= number < len(study):
        raise UserError(f"--point={number} is none of 0 to {len(study) - 1}: see --list")
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
        raise  # saved; the next start goes on with it
    except Exception as error:
        append_line(study.results, failure(study, task, f"{type(error).__name__}: {error}"))
        raise
    return 0


def _missing(study: Study, task: Task) -> str:
    """Which tuning runs a run of the second phase waits for."""
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
    """What every line about a run says first."""
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
    """Writes the lines of finished runs anew where another study of this workdir named them.

    A run with a value of a tuned field is also a point of an ordinary study, called
    "Q-K=V learning_rate=0.002" there, and its identity is the same.
    """
    done = study.done(tasks)
    for task in tasks:
        line = done.get(task.identity)
        if line and (line.get("label"), line.get("phase", "")) != (task.label, task.phase):
            first = heading(study, task)
            named = {*first, "phase", "tuned"}
            rest = {name: value for name, value in line.items() if name not in named}
            append_line(study.results, first | rest)


def failure(study: Study, task: Task, error: str) -> dict:
    """The line of a run that did not end."""
    return heading(study, task) | {"status": "failed", "error": error}


def _train(study: Study, task: Task) -> dict:
    from qkvjax.training.train import train

    folder = study.workdir / task.folder
    folder.mkdir(parents=True, exist_ok=True)
    summary = train(task.config, folder, log=lambda line: print(line, flush=True))
    facts = read_json(folder / "run.json")
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
            "training diverged: the score is no finite number; lower optimizer.learning_rate",
            code=DIVERGED,
        )
    return heading(study, task) | {
        "status": "done",
        "error": None,
        "metric": metric,
        "score": score,
        "train_score": summary.get(f"eval_train/{metric}"),
        **{name: summary[f"eval/{name}"] for name in _FACTS if f"eval/{name}" in summary},
        "tokenizer": task.config.data.tokenizer.partition(":")[0] if text else None,
        "score_pads": task.config.data.score_pads,
        "steps": summary["step"],
        "tokens": summary["step"] * task.config.data.batch_size * task.config.data.seq_len,
        "seconds": summary["seconds"],
        "curve": curve,
        "costs": facts["costs"],
        **_look(study, task, folder, summary),
    }


def _look(study: Study, task: Task, folder, summary: dict) -> dict:
    """What the report shows of one model: a sample of its text, spectra, the means inside."""
    from qkvjax.evaluation.inside import spectra_of
    from qkvjax.training.restore import load_model

    means = {
        name.removeprefix("inside/"): value
        for name, value in summary.items()
        if name.startswith("inside/")
    }
    found = {"sample": None, "inside": means or None, "spectra": None}
    first = task.seed == study.seeds[0] and task.setting == next(iter(study.settings))
    if task.phase == TUNE or (study.metric != "bits_per_byte" and not first):
        return found
    model, tokenizer, config, _ = load_model(folder)
    if tokenizer is not None:
        text = _sample(study, task, model, tokenizer, config)
        found["sample"] = {"prompt": study.prompt, "text": text}
    return found | {"spectra": spectra_of(model) if first else None}


def _sample(study: Study, task: Task, model, tokenizer, config) -> str:
    from qkvjax.generation.decode import continuation, generate, prompt_ids

    prompt = prompt_ids(tokenizer, study.prompt)[: config.data.seq_len - 1]
    room = config.data.seq_len - len(prompt) if model.spec.bounded else SAMPLE_TOKENS
    made = generate(
        model,
        prompt,
        num_ids=tokenizer.num_ids,
        max_tokens=min(SAMPLE_TOKENS, room),
        temperature=0.8,
        seed=task.seed,
        dtype=config.train.compute_dtype,
    )
    return continuation(tokenizer, made.ids[0])
