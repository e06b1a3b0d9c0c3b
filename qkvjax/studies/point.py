"""One run of a study: train, sample, and a line in results.jsonl."""

from __future__ import annotations

import math

from qkvjax.errors import UserError
from qkvjax.studies.grid import Study, Task
from qkvjax.training.loop import DIVERGED
from qkvjax.training.metrics import append_line, read_json, read_lines
from qkvjax.training.signals import Stopped

SAMPLE_TOKENS = 240


def train_point(study: Study, number: int) -> int:
    """Trains task `number` in this process; a failure is recorded before it is raised.

    Raises:
      UserError: no such point.
    """
    if not 0 <= number < len(study.tasks):
        raise UserError(f"--point={number} is none of 0 to {len(study.tasks) - 1}: see --list")
    task = study.tasks[number]
    if task.identity in study.done():
        print(f"point {number} ({task.label}, seed {task.seed}) is finished")
        return 0
    try:
        append_line(study.results, _train(study, task))
    except Stopped:
        raise  # saved; the next start goes on with it
    except Exception as error:
        append_line(study.results, failure(study, task, f"{type(error).__name__}: {error}"))
        raise
    return 0


def heading(study: Study, task: Task) -> dict:
    """What every line about a run says first."""
    return {
        "label": task.label,
        "overrides": task.overrides,
        "seed": task.seed,
        "identity": task.identity,
        "data_digest": study.digest(task) or "",
        "workdir": task.folder,
    }


def failure(study: Study, task: Task, error: str) -> dict:
    """The line of a run that did not end."""
    return heading(study, task) | {"status": "failed", "error": error}


def _train(study: Study, task: Task) -> dict:
    from qkvjax.train import train

    folder = study.workdir / task.folder
    folder.mkdir(parents=True, exist_ok=True)
    summary = train(task.config, folder, log=lambda line: print(line, flush=True))
    facts = read_json(folder / "run.json")
    curve = [
        {
            "step": line["step"],
            "tokens": line["tokens"],
            "seconds": line["seconds"],
            "bits_per_byte": line["eval/bits_per_byte"],
        }
        for line in read_lines(folder / "metrics.jsonl")
        if "eval/bits_per_byte" in line
    ]
    if not curve:
        raise UserError("the study needs an evaluator called `eval`: see config.evals")
    score = summary["eval/bits_per_byte"]
    if score is None or not math.isfinite(score):
        raise UserError(
            "training diverged: the score is no finite number; lower optimizer.learning_rate",
            code=DIVERGED,
        )
    return heading(study, task) | {
        "status": "done",
        "error": None,
        "metric": "bits_per_byte",
        "score": score,
        "train_score": summary.get("eval_train/bits_per_byte"),
        "perplexity": summary["eval/perplexity"],
        "tokenizer": task.config.data.tokenizer.partition(":")[0],
        "num_labels": summary["eval/num_labels"],
        "num_bytes": summary["eval/num_bytes"],
        "pad_fraction": summary["eval/pad_fraction"],
        "score_pads": task.config.data.score_pads,
        "steps": summary["step"],
        "tokens": summary["step"] * task.config.data.batch_size * task.config.data.seq_len,
        "seconds": summary["seconds"],
        "curve": curve,
        "costs": facts["costs"],
        "sample": {"prompt": study.prompt, "text": _sample(study, task, folder)},
    }


def _sample(study: Study, task: Task, folder) -> str:
    from qkvjax.generation.decode import continuation, generate, prompt_ids
    from qkvjax.training.restore import load_model

    model, tokenizer, config, _ = load_model(folder)
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
