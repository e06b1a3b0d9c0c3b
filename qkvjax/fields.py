"""The fields of a configuration, each stated once: type, default, help, choices, range, aliases.

The groups are frozen dataclasses, and `Config` has one of each: everything below the commands takes
it (`qkvjax.config.resolve` makes it). Recipes and the command line change a ConfigDict with the
same names (`qkvjax.config.default`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from qkvjax.attention.spec import POSITIONS, ROTARY_VALUES
from qkvjax.durations import Duration
from qkvjax.kernels import IMPLEMENTATIONS
from qkvjax.models.spec import KINDS, NORMS

DTYPES = ("float32", "bfloat16")


def setting(
    default,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    below: float = math.inf,
    aliases: str = "",
):
    """Returns a field of a group.

    Args:
      default: None where the field may be unset.
      help: one line.
      choices: the values that it may have.
      low, below: a number is at least the first and below the second; nan is neither.
      aliases: what other frameworks call it, where no part of its name is the same.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "low": low,
        "below": below,
        "aliases": tuple(aliases.split()),
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Model:
    """What is built."""

    kind: str = setting(
        "lm", "what is built; lm is causal, an encoder and a vit see both directions", choices=KINDS
    )
    d_model: int = setting(
        128,
        "D, width of the residual stream",
        aliases="n_embd hidden_size embed_dim dim hidden_dim n_embed width",
    )
    num_layers: int = setting(
        4,
        "L, blocks of attention and feed-forward",
        low=1,
        below=10_000,
        aliases="n_layer n_layers layers num_hidden_layers depth",
    )
    num_heads: int = setting(
        4, "N, query heads", aliases="n_head n_heads heads num_attention_heads"
    )
    num_kv_heads: int | None = setting(
        None,
        "K, key-value heads: unset means N; a divisor of N is GQA; 1, MQA",
        aliases="n_kv_heads n_kv_head kv_heads num_key_value_heads",
    )
    head_dim: int | None = setting(None, "H, width of a head; unset means d_model / num_heads")
    sharing: str = setting("q-k-v", "roles that share a projection: q-k-v q-k=v q=k-v q=v-k q=k=v")
    position: str = setting("rope", "how positions enter", choices=POSITIONS, aliases="pos_emb")
    max_length: int | None = setting(
        None,
        "positions there is room for; unset means data.seq_len",
        low=1,
        below=2**31,
        aliases="max_position_embeddings",
    )
    rotary_values: str = setting(
        "raw", "what V is when it shares the projection of a rotated role", choices=ROTARY_VALUES
    )
    rotary_fraction: float = setting(1.0, "part of each head that is rotated")
    rotary_base: float = setting(
        10_000.0, "base of the rotary frequencies", low=1, aliases="rope_theta rope_base theta"
    )
    qk_norm: bool = setting(True, "RMS norm with a learned gain on queries and keys")
    score: tuple[str, ...] = setting(
        (),
        "modifiers of the scores in order: score2d(m) score_scale column_bias role_bias role_gain",
    )
    window: int | None = setting(
        None, "keys a query sees, itself included; unset means all", aliases="sliding_window"
    )
    norm: str = setting("rmsnorm", "norm before each branch", choices=NORMS)
    mlp: str = setting(
        "swiglu",
        "swiglu gelu relu2, with options: (up=down) (layers=2)"
        " (experts=8,top=2,balance=.01,z_loss=.001)",
        aliases="activation hidden_act",
    )
    mlp_ratio: float = setting(
        2.75,
        "feed-forward width over d_model, rounded to a multiple of 8",
        low=0,
        aliases="d_ff intermediate_size ffn_dim",
    )
    dropout: float = setting(
        0.0,
        "rate on the embedding and both branches (vit: both feed-forward maps)",
        aliases="dropout_rate",
    )
    patch_size: int = setting(4, "pixels of a side of a patch; vit only", low=1, below=2**15)
    use_bias: bool = setting(False, "biases on linear maps and LayerNorm", aliases="bias")
    tie_embeddings: bool = setting(
        True, "the output head is the embedding, transposed", aliases="tie_word_embeddings"
    )
    init: str = setting(
        "fan_in",
        "normal: N(0, .02^2); fan_in; uniform: torch.nn.Linear's; each may have (positions=.02)",
    )
    layer_overrides: tuple[Mapping, ...] = setting(
        (), "a repeating pattern: a tuple of dicts, one a layer"
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on, and in which batches."""

    source: str = setting(
        "stdlib",
        "stdlib text: jsonl: parquet: arrow: tokens: kjv tfds:, or synthetic:"
        " digits npz: idx: anomaly",
        aliases="dataset data_dir data_path corpus train_data",
    )
    tokenizer: str = setting(
        "bytes", "bytes, bpe:PATH (tokenizer.json) or gpt2:PATH (folder)", aliases="tokenizer_path"
    )
    seq_len: int = setting(
        256,
        "T, tokens of a training sequence",
        low=1,
        below=2**31,
        aliases=(
            "block_size context_length ctx_len n_ctx max_seq_len seq_length "
            "sequence_length max_seq_length context"
        ),
    )
    batch_size: int = setting(
        16,
        "sequences of a step, over all devices and micro-batches",
        low=1,
        below=2**31,
        aliases="bs batch global_batch_size train_batch_size per_device_train_batch_size",
    )
    score_pads: bool = setting(
        False, "one padded document a sequence, pads scored: the paper's artefact"
    )
    augment: str = setting("none", "augmentation of training images", choices=("none", "crop_flip"))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How parameters move."""

    name: str = setting(
        "adamw",
        "muon updates the matrices of blocks, adamw the rest",
        choices=("adamw", "muon"),
        aliases="optim optimizer_name",
    )
    learning_rate: float = setting(
        0.003, "the peak", low=0, aliases="lr max_lr peak_lr base_lr peak_learning_rate"
    )
    final_learning_rate: float = setting(
        0.0003, "where the schedule ends", low=0, aliases="min_lr end_lr final_lr min_learning_rate"
    )
    schedule: str = setting(
        "cosine",
        "of the learning rate; wsd falls at the end",
        choices=("cosine", "wsd", "multistep", "constant"),
        aliases="scheduler lr_scheduler lr_schedule lr_scheduler_type",
    )
    warmup_steps: Duration | None = setting(
        "2%",
        "a duration; the learning rate rises linearly",
        aliases="warmup warmup_iters num_warmup_steps warmup_ratio",
    )
    weight_decay: float = setting(0.1, "decoupled, times the learning rate", low=0, aliases="wd")
    decay: str = setting(
        "matrices", "which parameters decay; all: as in the paper", choices=("matrices", "all")
    )
    b1: float = setting(
        0.9, "decay of the first moment", low=0, below=1, aliases="beta1 betas adam_beta1"
    )
    b2: float = setting(
        0.95, "decay of the second moment", low=0, below=1, aliases="beta2 adam_beta2"
    )
    clip_norm: float = setting(
        1.0,
        "largest global norm of the gradient; 0 means no clipping",
        low=0,
        aliases="grad_clip max_grad_norm clip gradient_clipping gradient_clip_val clip_grad_norm",
    )
    z_loss: float = setting(0.0, "weight of log(Z)^2, which keeps logits near zero", low=0)
    skip_spikes: float | None = setting(
        None,
        "leaves out steps whose loss or gradient is so many robust deviations too high; 10, say",
        low=0,
    )
    average: float | None = setting(
        None,
        "decay of an average of the weights, which evaluation then uses; 0.999, say",
        low=0,
        below=1,
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, with what precision, and what is kept."""

    steps: Duration = setting(
        1000,
        "a duration",
        aliases=(
            "iters max_iters max_steps num_steps total_steps num_train_steps "
            "training_steps iterations train_iters epochs num_epochs num_train_epochs "
            "max_epochs tokens max_tokens"
        ),
    )
    init_from: str | None = setting(
        None,
        "RUN or RUN@STEP, a checkpoint to start from; its weights alone where"
        " the configurations differ",
    )
    max_seconds: float | None = setting(
        None,
        "stop and save after this long, however many steps are left",
        low=0,
        aliases="time_limit",
    )
    accumulation: int = setting(
        1,
        "micro-batches a step; does not change the loss",
        low=1,
        aliases="grad_accum gradient_accumulation_steps grad_accum_steps accumulate_grad_batches",
    )
    compute_dtype: str = setting(
        "float32",
        "of activations and products",
        choices=DTYPES,
        aliases="dtype precision bf16 fp16 amp mixed_precision torch_dtype",
    )
    param_dtype: str = setting(
        "float32", "of the blocks' matrices; bfloat16 keeps float32 masters", choices=DTYPES
    )
    gradient_dtype: str = setting(
        "float32", "of the matrices' gradients, also between devices", choices=DTYPES
    )
    remat: str = setting(
        "none",
        "what the backward pass computes again; dots: all but products with parameters",
        choices=("none", "block", "dots"),
        aliases="gradient_checkpointing activation_checkpointing checkpointing rematerialization",
    )
    attention: str = setting(
        "auto",
        "what computes attention; auto: the fastest measured",
        choices=("auto", *IMPLEMENTATIONS),
    )
    unroll: int = setting(
        1, "repetitions of the layer pattern in a turn of the scan over a deep stack", low=1
    )
    log_every: Duration | None = setting(50, "a duration", aliases="log_interval logging_steps")
    eval_every: Duration | None = setting(
        "10%",
        "a duration; the last step is always evaluated",
        aliases="eval_interval eval_steps eval_freq",
    )
    checkpoint_every: Duration | None = setting(
        "20%",
        "a duration; the last step is always saved",
        aliases="save_steps save_interval save_every ckpt_interval",
    )
    keep_checkpoints: int = setting(
        2, "how many of the newest stay", low=1, aliases="save_total_limit"
    )
    keep_every: Duration | None = setting(
        None, "a duration: checkpoints of its multiples stay as well"
    )
    keep_best: bool = setting(False, "the checkpoint of the best evaluation stays as well")
    wandb: str | None = setting(
        None, "a Weights & Biases project; needs the extra qkvjax[wandb]", aliases="wandb_project"
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis of the mesh."""

    @property
    def sizes(self) -> dict[str, int]:
        """The number of devices of each axis."""
        return dataclasses.asdict(self)

    replica: int = setting(
        1, "devices that hold whole copies; -1 means all that are left", aliases="dp data_parallel"
    )
    fsdp: int = setting(
        1, "devices that parameters are sharded over; -1 means all that are left", aliases="zero"
    )
    context: int = setting(
        1, "devices that each sequence is cut over", aliases="cp context_parallel"
    )
    tensor: int = setting(
        1,
        "devices that heads and feed-forward are cut over",
        aliases="tp tensor_parallel tensor_parallel_size",
    )
    expert: int = setting(1, "devices that the batch and the experts are cut over", aliases="ep")


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """An evaluation that runs while training."""

    kind: str = setting(
        "bits_per_byte", "what is scored", choices=("bits_per_byte", "accuracy", "inside")
    )
    split: str = setting("validation", "of the data", choices=("train", "validation"))
    max_labels: int | None = setting(None, "about so many labels are scored; unset: all", low=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole configuration."""

    seed: int = setting(
        0,
        "initial values, data order and dropout all follow from it",
        low=0,
        below=2**31,
        aliases="random_seed rng_seed",
    )
    model: Model = Model()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    mesh: Mesh = Mesh()
    evals: Mapping[str, Evaluator] = dataclasses.field(default_factory=dict)


GROUPS = {"model": Model, "data": Data, "optimizer": Optimizer, "train": Train, "mesh": Mesh}
# Fields of earlier versions; a saved configuration may still have them, unset.
RETIRED = ("model.position_std",)
