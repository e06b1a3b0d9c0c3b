"""Opens the data set that a configuration names, of whatever kind."""

from __future__ import annotations

from collections.abc import Callable

from qkvjax.data.dataset import prepare
from qkvjax.data.dataset_like import DatasetLike
from qkvjax.data.examples import Examples
from qkvjax.data.image_examples import patches_of, sets_of
from qkvjax.data.images import open_images
from qkvjax.data.tasks import TASKS, open_task
from qkvjax.errors import UserError

IMAGES = ("digits", "npz", "idx", "tfds")
_NOT_TEXT = {"anomaly", "digits", "npz", "idx"}  # a tfds: data set may be text
# What each kind of model reads, for messages.
READS = {
    "lm": "text (stdlib, text:PATH, ...) or a synthetic:TASK that needs no later token",
    "encoder": "synthetic:TASK or anomaly:IMAGES",
    "vit": "images: digits, npz:PATH, idx:FOLDER or tfds:NAME",
}


def reads_text(config) -> bool:
    """Returns whether the data of a run are text, so that its tokenizer sets the model's shapes."""
    return config.model.kind == "lm" and not config.data.source.startswith("synthetic:")


def check_fits(dataset: DatasetLike, spec) -> None:
    """Raises UserError unless a trained model, of this ModelSpec, can read and label the data."""
    if not isinstance(dataset, Examples):
        return  # text is read with the tokenizer of the model
    num_inputs = dataset.num_inputs
    num_outputs = dataset.num_outputs
    is_symbols = dataset.name.startswith("synthetic:")
    # A task may use fewer symbols than the model has; vectors need the exact width.
    fits = num_inputs <= spec.vocab_size if is_symbols else num_inputs == spec.vocab_size
    if not fits or num_outputs > spec.num_outputs:
        raise UserError(
            f"{dataset.name} has tokens of {num_inputs} {'symbols' if is_symbols else 'numbers'}"
            f" and {num_outputs} classes, the model {spec.vocab_size} and {spec.num_outputs}:"
            " choose data like those it was trained on"
        )


def open_dataset(
    config,
    source: str | None = None,
    *,
    whole: bool = False,
    log: Callable[[str], None] = lambda line: None,
    alive: Callable[[], None] = lambda: None,
) -> DatasetLike:
    """Opens the data of a run; text is prepared the first time.

    Args:
      config: a configuration, of which `model.kind`, `model.patch_size` and `data` count.
      source: replaces `data.source`.
      whole: all documents are validation, to score a corpus; labelled examples keep their split.
      log: gets a line about the data, and more of them while they are prepared.
      alive: called again and again while text is prepared.

    Raises:
      UserError: see the sources; or the model's kind cannot read this one.
    """
    data = config.data
    kind = config.model.kind
    source = data.source if source is None else source
    source_kind = source.partition(":")[0]
    if kind == "lm" and source_kind != "synthetic" and source_kind not in _NOT_TEXT:
        return prepare(
            source,
            data.tokenizer,
            data.seq_len,
            data.score_pads,
            whole=whole,
            log=log,
            alive=alive,
        )
    examples = _open_examples(config, kind, source, source_kind)
    log(f"data: {examples.description}")
    return examples


def _open_examples(config, kind: str, source: str, source_kind: str) -> Examples:
    """Opens labelled examples for a kind of model."""
    seq_len = config.data.seq_len
    if kind == "vit" and source_kind in IMAGES:
        images = open_images(source)
        return patches_of(source, images, config.model.patch_size, seq_len, config.data.augment)
    if kind == "encoder" and source_kind == "anomaly":
        image_source = source.partition(":")[2]
        if image_source.partition(":")[0] not in IMAGES:
            raise UserError(f"data.source={source!r}: write anomaly:IMAGES, as in anomaly:digits")
        return sets_of(source, open_images(image_source), seq_len)
    if kind in ("lm", "encoder") and source_kind == "synthetic":
        examples = open_task(source, seq_len)
        if kind == "lm" and not examples.causal:
            causal_tasks = ", ".join(name for name, task in TASKS.items() if task.causal)
            raise UserError(
                f"data.source={source!r} has labels that depend on later tokens, which a causal"
                f" model cannot see: use model.kind=encoder, or one of {causal_tasks}"
            )
        return examples
    raise UserError(
        f"model.kind={kind!r} does not read data.source={source!r}: it reads {READS[kind]}"
    )
