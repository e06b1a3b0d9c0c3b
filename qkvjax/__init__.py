"""qkvjax: does your transformer need three projections?

`load(workdir)` gives a notebook the model, the tokenizer and the configuration of a run;
everything else is a door: `qkvjax --help`.
"""

from __future__ import annotations


def load(workdir, step: int | None = None):
    """Restores a trained model, whole on one device, for notebooks and scripts.

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
    from qkvjax.training.restore import load_model

    model, tokenizer, config, _ = load_model(workdir, step)
    return model, tokenizer, config


__all__ = ["load"]
