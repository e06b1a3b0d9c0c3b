"""A language model from one depth or size.

  --config=configs/lm.py:depth=4                  4 layers, everything else follows
  --config=configs/lm.py:size=124m,sharing=q-k=v  GPT-2's small shape, one tensor for K and V
  --config=configs/lm.py:size=300m,recipe=paper   the paper's model, optimizer and schedule

`depth=d` gives d layers of width 64 d (heads of width 64; 32 below depth 4). `size` names a
shape of the table below. Two recipes: `modern` (RMSNorm, RoPE, SwiGLU, query-key norm, no
biases) and `paper` (pre-LayerNorm, GELU, learned positions, biases, N(0, 0.02^2)).

  size    modern         paper          sequence  sequences a step  steps (20 tokens a parameter)
  30m     30,160,512     30,160,896     512       64                6,480
  124m    125,358,336    124,475,904    1024      512               3,240
  300m    308,456,960    305,534,976    2048      1152              2,133
  350m    359,845,888    354,871,296    1024      512               11,520
  1.2b    1,233,482,496  1,215,102,976  2048      576               18,773
  3b      3,391,670,272  3,339,134,976  4096      512               30,240
  7b      6,782,988,288  6,666,985,472  4096      1024              30,720
  70b     68,864,471,040 55,482,302,464 4096      1024              307,200

Sizes read GPT-2 tokens from data/ and its BPE from data/gpt2, and train on all devices, over which
parameters are sharded (mesh.fsdp=-1). A depth trains on the interpreter's library, on one device
(depth=2 has 435,968 parameters, depth=4 3,281,664). No size has been trained yet.

Learning rate of the modern recipe: 3e-3 at width 256, falling as width^-1/2; the paper's is
its own, 2e-4 at 300m and 6e-5 at 1.2b.
"""

from qkvjax import config as base
from qkvjax.errors import UserError, did_you_mean

# name: (layers, width, heads, sequence length, sequences a step)
SIZES = {
    "30m": (6, 384, 6, 512, 64),
    "124m": (12, 768, 12, 1024, 512),
    "300m": (20, 1024, 16, 2048, 1152),
    "350m": (24, 1024, 16, 1024, 512),
    "1.2b": (22, 2048, 32, 2048, 576),
    "3b": (28, 3072, 24, 4096, 512),
    "7b": (32, 4096, 32, 4096, 1024),
    "70b": (80, 8192, 64, 4096, 1024),
}
# What else a size fixes: the largest has grouped heads, as its kin.
ALSO = {"70b": {"num_kv_heads": 8, "mlp_ratio": 3.5}}


def get_config(arg=None):
    given = base.parse_arg(
        arg, depth=0, size=None, recipe="modern", sharing="q-k-v", num_kv_heads=0
    )
    config = base.default()
    model, data = config.model, config.data
    if given.size and given.depth:
        raise UserError("give depth or size, not both")
    if given.depth < 0:
        raise UserError(f"depth={given.depth} must be at least 1: it counts layers")
    if given.size:
        if given.size not in SIZES:
            near = did_you_mean(given.size, SIZES)
            raise UserError(f"size={given.size!r} is none of {', '.join(SIZES)}{near}")
        layers, width, heads, data.seq_len, data.batch_size = SIZES[given.size]
        data.source, data.tokenizer = "tokens:data", "gpt2:data/gpt2"
        config.train.steps = f"{20 * 12 * layers * width**2} tokens"  # 20 a parameter
        config.train.compute_dtype = "bfloat16"
        config.mesh.fsdp = -1  # all devices there are; the mesh is no part of what a run is
        model.update(ALSO.get(given.size, {}))
    else:
        layers = given.depth or 4
        width = 64 * layers
        heads = width // (32 if layers < 4 else 64)
    model.num_layers, model.d_model, model.num_heads = layers, width, heads
    model.sharing = given.sharing
    if given.num_kv_heads:
        model.num_kv_heads = given.num_kv_heads
    config.optimizer.learning_rate = round(3e-3 * (256 / width) ** 0.5, 6)
    config.optimizer.final_learning_rate = config.optimizer.learning_rate / 10
    if given.recipe == "paper":
        _paper(config, width)
    elif given.recipe != "modern":
        raise UserError(f"recipe={given.recipe!r} is none of modern, paper")
    return config


def _paper(config, width):
    """The paper's language models (Kayyam et al. 2026, section 4.3 and its code)."""
    config.model.update(
        position="learned",
        norm="layernorm",
        mlp="gelu",
        mlp_ratio=4.0,
        qk_norm=False,
        use_bias=True,
        init="normal",
        dropout=0.1,
    )
    rate, warmup = (2e-4, 500) if width <= 1024 else (6e-5, 1000)
    config.optimizer.update(
        learning_rate=rate,
        final_learning_rate=rate / 10,
        warmup_steps=warmup,
        schedule="cosine",
        weight_decay=0.1,
        decay="all",
        clip_norm=1.0,
    )
