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

# Kind of an evaluator -> the function that scores, and the program that it runs on each batch.
SCORES = {"bits_per_byte": language.score, "accuracy": accuracy.score, "inside": inside.score}
PROGRAMS = {"bits_per_byte": language.label_nats, "accuracy": accuracy.judge}


@dataclasses.dataclass
class Evaluator:
    """One entry of `config.evals`: train state -> metrics.

    Attributes:
      kind: one of SCORES.
      options: `split` and `max_labels`, where the kind has them.
      dataset: what is scored.
      rows: rows of a batch over all devices.
      dtype: of activations and matrix products.
      mesh: where the model is; None is one device.
      program: the program of PROGRAMS, compiled; None compiles it at the first call.
      items_file: where each scoring writes the scores by document or example; None writes none.
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
          pulse: is called after each batch; an exception that it raises ends the scoring.
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
      config: the groups of a configuration.
      dataset: what is scored.
      mesh: where the model is; None is one device.
      workdir: evaluators of the validation split write items/NAME.npz there, the scores by
        document or example of the last evaluation; None writes none.

    Raises:
      UserError: bits per byte of data that are not text.
    """
    evaluators = {}
    for name, entry in config.evals.items():
        check_text(f"config.evals.{name}.kind", entry.kind, dataset)
        options = {}
        items_file = None
        if entry.kind in PROGRAMS:
            options = {"split": entry.split, "max_labels": entry.max_labels}
            if workdir and entry.split == "validation":
                items_file = workdir / "items" / f"{name}.npz"
        evaluators[name] = Evaluator(
            kind=entry.kind,
            options=options,
            dataset=dataset,
            rows=scoring.num_rows(config, mesh),
            dtype=jnp.dtype(config.train.compute_dtype),
            mesh=mesh,
            items_file=items_file,
        )
    return evaluators


def compile_evaluators(evaluators: Mapping[str, Evaluator], model) -> list:
    """Compiles the programs of the evaluators, so that a lack of memory shows before training.

    Evaluators with the same kind and rows share a program. Those of data that are not text compile
    at their first call.

    Args:
      model: as ShapeDtypeStructs with shardings.

    Returns:
      The compiled programs.
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
    """Returns the compiled program that scores text by bits per byte.

    Args:
      config: the groups of a configuration.
      model: as ShapeDtypeStructs with shardings.
      mesh: its devices may be of another machine.
    """
    batch = scoring.abstract_batch(mesh, scoring.num_rows(config, mesh), config.data.seq_len)
    dtype = jnp.dtype(config.train.compute_dtype)
    with jax.set_mesh(mesh):
        return language.label_nats.lower(model, batch, dtype=dtype).compile()


def num_scored(dataset, split: str = "validation", max_labels: int | None = None) -> float:
    """Returns about how many labels are scored."""
    return min(dataset.num_labels(split), max_labels or math.inf)


def check_text(where: str, kind: str, dataset) -> None:
    """Raises UserError where this kind of score needs text and the data are not text.

    Args:
      where: the field or flag that names the kind, for the message.
    """
    if kind == "bits_per_byte" and dataset.tokenizer is None:
        raise UserError(f"{where}='bits_per_byte' needs text, and the data are not: use accuracy")
