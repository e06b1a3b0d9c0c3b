"""The data set that a configuration names, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable

from qkvjax.data.dataset import Dataset, prepare
from qkvjax.data.examples import Examples
from qkvjax.data.image_examples import patches_of, sets_of
from qkvjax.data.images import open_images
from qkvjax.data.tasks import TASKS, open_task
from qkvjax.errors import UserError

IMAGES = ("digits", "npz", "idx", "tfds")
# What each kind of model reads: kinds of sources, and how to say it.
READS = {
    "lm": "text (stdlib, text:PATH, ...) or a synthetic:TASK that needs no later token",
    "encoder": "synthetic:TASK or anomaly:IMAGES",
    "vit": "images: digits, npz:PATH, idx:FOLDER or tfds:NAME",
}


def reads_text(config) -> bool:
    """Whether the data of a run are text, so that its tokenizer tells the model's shapes."""
    return config.model.kind == "lm" and not config.data.source.startswith("synthetic:")


def check_fits(dataset: Dataset | Examples, spec) -> None:
    """Raises UserError unless a trained model, of this ModelSpec, reads and labels such data."""
    if not isinstance(dataset, Examples):
        return  # its tokenizer is the model's
    wide, classes = dataset.num_inputs, dataset.num_outputs
    symbols = dataset.name.startswith("synthetic:")  # of which data may have fewer
    fits = wide <= spec.vocab_size if symbols else wide == spec.vocab_size
    if not fits or classes > spec.num_outputs:
        raise UserError(
            f"{dataset.name} has tokens of {wide} {'symbols' if symbols else 'numbers'} and"
            f" {classes} classes, the model {spec.vocab_size} and {spec.num_outputs}: choose data"
            " like those it was trained on"
        )


def open_dataset(
    config,
    source: str | None = None,
    *,
    whole: bool = False,
    log: Callable[[str], None] = lambda line: None,
    alive: Callable[[], None] = lambda: None,
) -> Dataset | Examples:
    """The data of a run.

    Args:
      config: a configuration, of which `model.kind`, `model.patch_size` and `data` count.
      source: replaces `data.source`.
      whole: all documents are validation, to score a corpus; labelled examples keep their split.
      log: gets a line about the data, and more of them while they are prepared.
      alive: called again and again while text is prepared.

    Raises:
      UserError: see the sources; or the model's kind cannot read this one.
    """
    data, kind = config.data, config.model.kind
    source = data.source if source is None else source
    name, _, rest = source.partition(":")
    if kind == "vit" and name in IMAGES:
        images = open_images(source)
        found = patches_of(source, images, config.model.patch_size, data.seq_len, data.augment)
    elif kind == "encoder" and name == "anomaly":
        if rest.partition(":")[0] not in IMAGES:
            raise UserError(f"data.source={source!r}: write anomaly:IMAGES, as in anomaly:digits")
        found = sets_of(source, open_images(rest), data.seq_len)
    elif kind in ("lm", "encoder") and name == "synthetic":
        found = open_task(source, data.seq_len)
        if kind == "lm" and not found.causal:
            able = ", ".join(name for name, task in TASKS.items() if task.causal)
            raise UserError(
                f"data.source={source!r} asks for what comes later, which a causal model cannot"
                f" see: use model.kind=encoder, or one of {able}"
            )
    elif kind == "lm" and name not in {"anomaly", *IMAGES} - {"tfds"}:
        sizes = (data.seq_len, data.score_pads)
        return prepare(source, data.tokenizer, *sizes, whole=whole, log=log, alive=alive)
    else:
        raise UserError(
            f"model.kind={kind!r} does not read data.source={source!r}: it reads {READS[kind]}"
        )
    log(f"data: {found.description}")
    return found
