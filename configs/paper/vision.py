"""The paper's vision study: a small ViT, six variants, the authors' reduced grid.

  qkvjax study --config=configs/paper/vision.py:source=digits --workdir=runs/digits
  qkvjax study --config=configs/paper/vision.py:dataset=cifar10 --workdir=runs/cifar10
  qkvjax study --config=configs/paper/vision.py:dataset=fashion_mnist,source=idx:FOLDER \\
      --workdir=runs/fashion

Kayyam et al. 2026, section 4.2, as the authors' later code settles it: Adam 1e-3, a tenth of it
from half of the run on and a hundredth from three quarters on, 128 images a step, dropout 0.1, 2
layers, width 64 or 256, 2 or 4 heads. `dataset` is one of the paper's: it says where TFDS has it
(`source` names another copy), its size, epochs and augmentation, and puts the authors' figures
beside ours. Without it `source` may be anything a ViT reads, `size` the side of its images and
`patch` of a patch (4 of 28, 2 of the 8 x 8 digits). Debian's package dataset-fashion-mnist has all
of Fashion-MNIST, in /usr/share/datasets/fashion-mnist.

TinyImageNet is a larger model in the paper: 12 layers of width 768 and 12 heads, learning rate
1e-4, 32 images a step, 20 epochs. It enlarged the images to 224 pixels with patches of 16, 196 of
them; here they keep their 64, with patches of 4, which makes 256. TFDS has no recipe of it: any
data set of 64 x 64 images that TFDS has prepared will do, as tiny_imagenet or as `source`.
"""

import json
from pathlib import Path

import ml_collections

from qkvjax import config as base
from qkvjax import sweep
from qkvjax.errors import UserError, among

# name: size, epochs, augment
DATASETS = {
    "mnist": (28, 20, "none"),
    "fashion_mnist": (28, 20, "none"),
    "cifar10": (32, 40, "crop_flip"),
    "cifar100": (32, 50, "crop_flip"),
    "tiny_imagenet": (64, 20, "none"),
}
# layers, images a step, learning rate, widths, heads
SMALL, LARGE = (2, 128, 1e-3, (64, 256), (2, 4)), (12, 32, 1e-4, (768,), (12,))


def get_config(arg=None):
    given = base.parse_arg(
        arg,
        dataset=None,
        source=None,
        size=0,
        patch=0,
        epochs=0,
        width=0,
        heads=0,
        seeds=3,
        augment=None,
    )
    name = given.dataset
    if name not in (None, *DATASETS):
        raise UserError(f"dataset={name!r} is none of {among(name, DATASETS)}")
    given.source = given.source or (f"tfds:{name}" if name else "digits")
    layers, batch, rate, widths, counts = LARGE if name == "tiny_imagenet" else SMALL
    known = DATASETS.get(name) or (8 if given.source == "digits" else 28, 20, "none")
    size, epochs, augment = (
        a or b for a, b in zip((given.size, given.epochs, given.augment), known)
    )
    patch = given.patch or (2 if size == 8 else 4)
    if size % patch:
        raise UserError(f"patch={patch} does not divide size={size}: choose a divisor")
    config = base.default()
    config.model.update(
        kind="vit",
        d_model=64,
        num_layers=layers,
        num_heads=2,
        position="learned",
        norm="layernorm",
        mlp="gelu",
        mlp_ratio=4.0,
        qk_norm=False,
        use_bias=True,
        tie_embeddings=False,
        init="uniform",
        dropout=0.1,
        patch_size=patch,
    )
    config.data.update(
        source=given.source, seq_len=(size // patch) ** 2 + 1, batch_size=batch, augment=augment
    )
    config.optimizer.update(
        learning_rate=rate,
        final_learning_rate=rate / 100,
        schedule="multistep",
        warmup_steps=0,
        weight_decay=0.0,
        b1=0.9,
        b2=0.999,
        clip_norm=0.0,
    )
    config.train.update(
        steps=f"{epochs}ep",
        log_every="5%",
        eval_every="5%",
        checkpoint_every="100%",
        keep_checkpoints=1,
    )
    config.evals = {
        "eval": {"kind": "accuracy", "split": "validation"},
        "eval_train": {"kind": "accuracy", "split": "train", "max_labels": 2_000},
    }
    tables = json.loads((Path(__file__).parent / "vision.json").read_text())
    config.study = ml_collections.ConfigDict(
        {
            "title": f"Does a small ViT need three projections? ({given.source})",
            "points": sweep.paper_variants(50),
            "settings": tuple(
                {"label": f"d{width} H{heads}", "model.d_model": width, "model.num_heads": heads}
                for width in ((given.width,) if given.width else widths)
                for heads in ((given.heads,) if given.heads else counts)
            ),
            "seeds": given.seeds,
            "reference": tables.get(name),
        }
    )
    return config
