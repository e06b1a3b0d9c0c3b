"""The evaluators of a run, as `config.evals` names them."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from qkvjax.errors import UserError
from qkvjax.evaluation import accuracy, inside, language

SCORES = {"bits_per_byte": language.score, "accuracy": accuracy.score, "inside": inside.score}


def make_evaluators(config, dataset, mesh) -> dict:
    """The evaluators of `config.evals`, validated: name -> (train state -> metrics).

    Raises:
      UserError: bits per byte of what is no text.
    """
    evaluators = {}
    for name, options in config.evals.items():
        options = dict(options)
        kind = options.pop("kind", "bits_per_byte")
        check_text(f"config.evals.{name}.kind", kind, dataset)
        evaluators[name] = functools.partial(
            _score_state, SCORES[kind], config=config, dataset=dataset, mesh=mesh, **options
        )
    return evaluators


def check_text(where: str, kind: str, dataset) -> None:
    """Raises UserError when `kind` of score needs text and the data have none."""
    if kind == "bits_per_byte" and not hasattr(dataset, "tokenizer"):
        raise UserError(f"{where}='bits_per_byte' needs text, which the data are not: use accuracy")


def _score_state(score, state, *, config, **arguments):
    dtype = jnp.dtype(config.train.compute_dtype)
    return score(state.model, batch_size=config.data.batch_size, dtype=dtype, **arguments)
