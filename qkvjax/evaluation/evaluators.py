"""The evaluators of a run, as `config.evals` names them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from qkvjax.errors import UserError
from qkvjax.evaluation import accuracy, inside, language, scoring
from qkvjax.evaluation.items import Items
from qkvjax.parallel import distributed

SCORES = {"bits_per_byte": language.score, "accuracy": accuracy.score, "inside": inside.score}
PROGRAMS = {"bits_per_byte": language.label_nats, "accuracy": accuracy.judge}


@dataclasses.dataclass
class Evaluator:
    """One entry of `config.evals`: train state -> metrics.

    Attributes:
      kind: one of SCORES.
      options: `split` and `max_labels`, where the kind has them.
      rows: of a batch, over all devices.
      program: the compiled one of PROGRAMS; None compiles when it is called.
      items_file: where the scores by document or example go after each scoring; None keeps none.
    """

    kind: str
    options: dict
    dataset: object
    rows: int
    dtype: jnp.dtype
    mesh: jax.sharding.Mesh | None
    program: Callable | None = None
    items_file: Path | None = None

    def __call__(
        self,
        state,
        pulse: Callable[[], None] = lambda: None,
        log: Callable[[str], None] | None = None,
    ) -> Mapping[str, float]:
        """Scores the state's average of the weights, where it has one, else its weights.

        Args:
          pulse: is called after each batch; what it raises ends the scoring.
          log: gets lines about progress.
        """
        average = getattr(state, "average", None)
        model = state.model if average is None else average
        arguments = {"batch_size": self.rows, "dtype": self.dtype, "mesh": self.mesh}
        items = Items()
        if self.kind in PROGRAMS:
            arguments |= {"program": self.program, "pulse": pulse, "log": log}
            arguments["num_labels"] = num_scored(self.dataset, **self.options)
            arguments["items"] = items
        scores = SCORES[self.kind](model, self.dataset, **arguments, **self.options)
        if self.items_file is not None and distributed.is_first():
            items.save(self.items_file)
        return scores


def make_evaluators(config, dataset, mesh, workdir: Path | None = None) -> dict[str, Evaluator]:
    """Returns the evaluators of `config.evals` by name, validated.

    Args:
      workdir: gets items/NAME.npz, the scores by document or example of the last evaluation, of
        those that score the validation split; None keeps none.

    Raises:
      UserError: bits per byte of what is not text.
    """
    evaluators = {}
    for name, asked in config.evals.items():
        check_text(f"config.evals.{name}.kind", asked.kind, dataset)
        scored = asked.kind in PROGRAMS and asked.split == "validation"
        has_options = asked.kind in PROGRAMS
        options = {"split": asked.split, "max_labels": asked.max_labels} if has_options else {}
        evaluators[name] = Evaluator(
            kind=asked.kind,
            options=options,
            dataset=dataset,
            rows=scoring.num_rows(config, mesh),
            dtype=jnp.dtype(config.train.compute_dtype),
            mesh=mesh,
            items_file=workdir / "items" / f"{name}.npz" if workdir and scored else None,
        )
    return evaluators


def compile_evaluators(evaluators: Mapping[str, Evaluator], model) -> list:
    """Compiles what the evaluators run, so that what does not fit shows before training.

    Args:
      model: as ShapeDtypeStructs with shardings.

    Returns:
      The compiled programs. Data without text keep their programs for the first call.
    """
    compiled = {}
    for evaluator in evaluators.values():
        if evaluator.kind not in PROGRAMS or evaluator.dataset.tokenizer is None:
            continue
        key = evaluator.kind, evaluator.rows
        if key not in compiled:
            batch = scoring.abstract_batch(
                evaluator.mesh, evaluator.rows, evaluator.dataset.seq_len
            )
            program = PROGRAMS[evaluator.kind]
            compiled[key] = program.lower(model, batch, dtype=evaluator.dtype).compile()
        evaluator.program = compiled[key]
    return list(compiled.values())


def compile_scoring(config, model, mesh):
    """The program that scores text by bits per byte, compiled for a mesh whose devices need not be
    here.

    Args:
      model: as ShapeDtypeStructs with shardings.
    """
    batch = scoring.abstract_batch(mesh, scoring.num_rows(config, mesh), config.data.seq_len)
    dtype = jnp.dtype(config.train.compute_dtype)
    with jax.set_mesh(mesh):
        return language.label_nats.lower(model, batch, dtype=dtype).compile()


def num_scored(dataset, split: str = "validation", max_labels: int | None = None) -> float:
    """About how many labels are scored."""
    return min(dataset.num_labels(split), max_labels or math.inf)


def check_text(where: str, kind: str, dataset) -> None:
    """Raises UserError when `kind` of score needs text and the data have none."""
    if kind == "bits_per_byte" and dataset.tokenizer is None:
        raise UserError(f"{where}='bits_per_byte' needs text, which the data are not: use accuracy")
