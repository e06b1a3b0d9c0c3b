"""qkvjax: does your transformer need three projections?

`load(workdir)` gives a notebook the model, the tokenizer and the configuration of a run;
`results(workdir)` and `curves(workdir)` give the results of a study as pandas tables. Everything
else is a command: `qkvjax --help`.
"""

from __future__ import annotations


def load(workdir, step: int | None = None):
    """Restores a trained model for notebooks and scripts, sharded over all devices.

    On several devices their mesh becomes the one in force (`jax.set_mesh`), so that the model is
    called as on one device; it is the same mesh for every model.

    Args:
      workdir: of a training run.
      step: which checkpoint; None means the newest intact one.

    Returns:
      (model, tokenizer, config): a `qkvjax.models.lm.LanguageModel`, which is a plain pytree
      and called as `model(ids)` with int [B, T] for logits [B, T, tokenizer.num_ids], or an
      `Encoder` or a `VisionTransformer`; a tokenizer with `encode(bytes)` and `decode(ids)`, None
      where there is no text; the run's ConfigDict.

    Raises:
      qkvjax.errors.UserError: no run, no such step, no intact checkpoint.
    """
    from qkvjax.parallel import placed
    from qkvjax.parallel.mesh import for_scoring
    from qkvjax.training.restore import load_model

    model, tokenizer, config, _ = load_model(workdir, step, mesh=for_scoring)
    placed.use_mesh_of(model)
    return model, tokenizer, config


def results(workdir):
    """Returns the runs of a study as a pandas.DataFrame, one a row: see `qkvjax.report.results`."""
    from qkvjax.report import results

    return results.results(workdir)


def curves(workdir):
    """Returns the evaluations of a study's runs as a pandas.DataFrame, one a row: see
    `qkvjax.report.results`."""
    from qkvjax.report import results

    return results.curves(workdir)


__all__ = ["curves", "load", "results"]
