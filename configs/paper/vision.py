"""The paper's vision study: a small ViT, six variants, the authors' reduced grid.

  qkvjax study --config=configs/paper/vision.py:source=digits --workdir=runs/digits
  qkvjax study --config=configs/paper/vision.py:source=idx:/usr/share/datasets/fashion-mnist \\
      --workdir=runs/fashion

Kayyam et al. 2026, section 4.2, as the authors' later code settles it: Adam 1e-3, a tenth of it
from half of the run on and a hundredth from three quarters on, 128 images a step, dropout 0.1, 2
layers, width 64 or 256, 2 or 4 heads. `size` is the side of an image and `patch` of a patch (4 of
28, 2 of the 8 x 8 digits); `epochs` 20 for MNIST and Fashion-MNIST, 40 for CIFAR-10, 50 for
CIFAR-100, which take augment=crop_flip; reference=mnist, cifar10 or cifar100 puts the authors'
figures beside ours. Debian's package dataset-fashion-mnist has all of Fashion-MNIST.
"""

import json
from pathlib import Path

import ml_collections

from qkvjax import config as base
from qkvjax import sweep
from qkvjax.errors import UserError


def get_config(arg=None):
    given = base.parse_arg(
        arg, source="digits", size=0, patch=0, epochs=20, width=0, heads=0, seeds=3,
        augment="none", reference=None,
    )  # fmt: skip
    kind = given.source.partition(":")[0]
    size = given.size or (8 if kind == "digits" else 32 if "cifar" in given.source else 28)
    patch = given.patch or (2 if size == 8 else 4)
    if size % patch:
        raise UserError(f"patch={patch} does not divide size={size}: choose a divisor")
    config = base.default()
    config.model.update(
        kind="vit", d_model=64, num_layers=2, num_heads=2, position="learned", norm="layernorm",
        mlp="gelu", mlp_ratio=4.0, qk_norm=False, use_bias=True, tie_embeddings=False,
        init="uniform", dropout=0.1, patch_size=patch,
    )  # fmt: skip
    config.data.update(
        source=given.source, seq_len=(size // patch) ** 2 + 1, batch_size=128, augment=given.augment
    )
    config.optimizer.update(
        learning_rate=1e-3, final_learning_rate=1e-5, schedule="multistep", warmup_steps=0,
        weight_decay=0.0, b1=0.9, b2=0.999, clip_norm=0.0,
    )  # fmt: skip
    config.train.update(steps=f"{given.epochs}ep", log_every="5%", eval_every="5%",
                        checkpoint_every="100%", keep_checkpoints=1)  # fmt: skip
    config.evals = {
        "eval": {"kind": "accuracy", "split": "validation"},
        "eval_train": {"kind": "accuracy", "split": "train", "max_labels": 2_000},
    }
    tables = json.loads((Path(__file__).parent / "vision.json").read_text())
    config.study = ml_collections.ConfigDict({
        "title": f"Does a small ViT need three projections? ({given.source})",
        "points": sweep.paper_variants(50),
        "settings": tuple(
            {"label": f"d{width} H{heads}", "model.d_model": width, "model.num_heads": heads}
            for width in ((given.width,) if given.width else (64, 256))
            for heads in ((given.heads,) if given.heads else (2, 4))
        ),
        "seeds": given.seeds,
        "reference": tables.get(given.reference),
    })  # fmt: skip
    return config
