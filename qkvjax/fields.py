"""Every field of the configuration with its default, one line of help, and where it ends."""

from __future__ import annotations

import math

from ml_collections import config_dict

ANY, INT, FLOAT, STR = (config_dict.placeholder(t) for t in (object, int, float, str))

# name: (default, help). ANY takes a duration: steps, or "2ep", "10M tokens", "5%".
FIELDS = {
    "seed": (0, "initial values, data order and dropout all follow from it"),
    "model.kind": ("lm", "what is built: lm (causal), encoder (bidirectional) or vit"),
    "model.d_model": (128, "D, width of the residual stream"),
    "model.num_layers": (4, "L, blocks of attention and feed-forward"),
    "model.num_heads": (4, "N, query heads"),
    "model.num_kv_heads": (INT, "K, key-value heads: unset means N; a divisor of N is GQA; 1, MQA"),
    "model.head_dim": (INT, "H, width of a head; unset means d_model / num_heads"),
    "model.sharing": ("q-k-v", "roles that share a projection: q-k-v q-k=v q=k-v q=v-k q=k=v"),
    "model.position": ("rope", "none, learned, sincos or rope"),
    "model.max_length": (INT, "positions there is room for; unset means data.seq_len"),
    "model.rotary_values": ("raw", "V when it shares a rotated role: raw rotated unrotated_output"),
    "model.rotary_fraction": (1.0, "part of each head that is rotated"),
    "model.rotary_base": (10_000.0, "base of the rotary frequencies"),
    "model.qk_norm": (True, "RMS norm with a learned gain on queries and keys"),
    "model.score": ((), "modifiers of the scores in order: score2d(m) score_scale column_bias"
                    " role_bias role_gain"),
    "model.window": (INT, "keys a query sees, itself included; unset means all"),
    "model.norm": ("rmsnorm", "rmsnorm or layernorm, before each branch"),
    "model.mlp": ("swiglu", "swiglu gelu relu2, with options: (up=down) (layers=2)"
                  " (experts=8,top=2,balance=.01,z_loss=.001)"),
    "model.mlp_ratio": (2.75, "feed-forward width over d_model, rounded to a multiple of 8"),
    "model.dropout": (0.0, "rate on the embedding and both branches (vit: both feed-forward maps)"),
    "model.patch_size": (4, "pixels of a side of a patch; vit only"),
    "model.use_bias": (False, "biases on linear maps and LayerNorm"),
    "model.tie_embeddings": (True, "the output head is the embedding, transposed"),
    "model.init": ("fan_in", "normal: N(0, .02^2); fan_in; uniform: torch.nn.Linear's; each may"
                   " have (positions=.02)"),
    "model.layer_overrides": ((), "a repeating pattern: a tuple of dicts, one a layer"),
    "data.source": ("stdlib", "stdlib text: jsonl: parquet: arrow: tokens: kjv tfds:, or synthetic:"
                    " digits npz: idx: anomaly"),
    "data.tokenizer": ("bytes", "bytes, bpe:PATH (tokenizer.json) or gpt2:PATH (folder)"),
    "data.seq_len": (256, "T, tokens of a training sequence"),
    "data.batch_size": (16, "sequences of a step, over all devices and micro-batches"),
    "data.score_pads": (False, "one padded document a sequence, pads scored: the paper's artefact"),
    "data.augment": ("none", "of training images: none or crop_flip"),
    "optimizer.name": ("adamw", "adamw, or muon for the matrices of blocks and adamw for the rest"),
    "optimizer.learning_rate": (3e-3, "the peak"),
    "optimizer.final_learning_rate": (3e-4, "where the schedule ends"),
    "optimizer.schedule": ("cosine", "cosine, wsd (falls at the end), multistep or constant"),
    "optimizer.warmup_steps": (ANY, "a duration; the learning rate rises linearly"),
    "optimizer.weight_decay": (0.1, "decoupled, times the learning rate"),
    "optimizer.decay": ("matrices", "what decays: matrices, or all as in the paper"),
    "optimizer.b1": (0.9, "decay of the first moment"),
    "optimizer.b2": (0.95, "decay of the second moment"),
    "optimizer.clip_norm": (1.0, "largest global norm of the gradient; 0 means no clipping"),
    "optimizer.z_loss": (0.0, "weight of log(Z)^2, which keeps logits near zero"),
    "optimizer.skip_spikes": (FLOAT, "leaves out steps whose loss or gradient is so many robust"
                              " deviations too high; 10, say"),
    "optimizer.average": (FLOAT, "decay of an average of the weights, which evaluation then uses;"
                          " 0.999, say"),
    "train.steps": (ANY, "a duration"),
    "train.init_from": (STR, "RUN or RUN@STEP, a checkpoint to start from; its weights alone where"
                        " the configurations differ"),
    "train.max_seconds": (FLOAT, "stop and save after this long, however many steps are left"),
    "train.accumulation": (1, "micro-batches a step; does not change the loss"),
    "train.compute_dtype": ("float32", "float32 or bfloat16, of activations and products"),
    "train.param_dtype": ("float32", "of the blocks' matrices; bfloat16 keeps float32 masters"),
    "train.gradient_dtype": ("float32", "of the matrices' gradients, also where they cross devices:"
                             " float32 or bfloat16"),
    "train.remat": ("none", "what gradients compute again: none, block, dots (all but products)"),
    "train.unroll": (1, "repetitions of the layer pattern in a turn of the scan over a deep stack"),
    "train.log_every": (ANY, "a duration"),
    "train.eval_every": (ANY, "a duration; the last step is always evaluated"),
    "train.checkpoint_every": (ANY, "a duration; the last step is always saved"),
    "train.keep_checkpoints": (2, "how many of the newest stay"),
    "train.keep_every": (ANY, "a duration: checkpoints of its multiples stay as well"),
    "train.keep_best": (False, "the checkpoint of the best evaluation stays as well"),
    "train.wandb": (STR, "a Weights & Biases project; needs the extra qkvjax[wandb]"),
    "mesh.replica": (1, "devices that hold whole copies; -1 means all that are left"),
    "mesh.fsdp": (1, "devices that parameters are sharded over; -1 means all that are left"),
    "mesh.context": (1, "devices that each sequence is cut over"),
    "mesh.tensor": (1, "devices that heads and feed-forward are cut over"),
    "mesh.expert": (1, "devices that the batch and the experts are cut over"),
}  # fmt: skip
# Durations that recipes may leave alone.
DURATIONS = {
    "optimizer.warmup_steps": "2%", "train.steps": 1000, "train.log_every": 50,
    "train.eval_every": "10%", "train.checkpoint_every": "20%",
}  # fmt: skip
# Numbers that are at least the first and below the second; nan is neither.
RANGES = {
    "seed": (0, 2**31),  # jax's keys keep 32 bits of a seed
    "model.num_layers": (1, 10_000), "model.max_length": (1, 2**31),
    "model.patch_size": (1, 2**15), "model.mlp_ratio": (0, math.inf),
    "model.rotary_base": (1, math.inf),
    "data.seq_len": (1, 2**31), "data.batch_size": (1, 2**31),
    "optimizer.learning_rate": (0, math.inf), "optimizer.final_learning_rate": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf), "optimizer.b1": (0, 1), "optimizer.b2": (0, 1),
    "optimizer.clip_norm": (0, math.inf), "optimizer.z_loss": (0, math.inf),
    "optimizer.skip_spikes": (0, math.inf), "optimizer.average": (0, 1),
    "train.accumulation": (1, math.inf), "train.keep_checkpoints": (1, math.inf),
    "train.unroll": (1, math.inf), "train.max_seconds": (0, math.inf),
}  # fmt: skip
# Fields of earlier versions; a saved configuration may still have them, unset.
RETIRED = ("model.position_std",)
MOST_STEPS = 2**31  # the train state counts them in 32 bits
# What other frameworks call our fields, where no part of the name is the same.
ALIASES = {
    "lr": "optimizer.learning_rate", "max_lr": "optimizer.learning_rate",
    "peak_lr": "optimizer.learning_rate", "base_lr": "optimizer.learning_rate",
    "peak_learning_rate": "optimizer.learning_rate",
    "min_lr": "optimizer.final_learning_rate", "end_lr": "optimizer.final_learning_rate",
    "final_lr": "optimizer.final_learning_rate",
    "min_learning_rate": "optimizer.final_learning_rate",
    "wd": "optimizer.weight_decay", "beta1": "optimizer.b1", "beta2": "optimizer.b2",
    "betas": "optimizer.b1", "adam_beta1": "optimizer.b1", "adam_beta2": "optimizer.b2",
    "warmup": "optimizer.warmup_steps", "warmup_iters": "optimizer.warmup_steps",
    "num_warmup_steps": "optimizer.warmup_steps", "warmup_ratio": "optimizer.warmup_steps",
    "grad_clip": "optimizer.clip_norm", "max_grad_norm": "optimizer.clip_norm",
    "clip": "optimizer.clip_norm", "gradient_clipping": "optimizer.clip_norm",
    "gradient_clip_val": "optimizer.clip_norm", "clip_grad_norm": "optimizer.clip_norm",
    "optim": "optimizer.name", "optimizer_name": "optimizer.name",
    "scheduler": "optimizer.schedule", "lr_scheduler": "optimizer.schedule",
    "lr_schedule": "optimizer.schedule", "lr_scheduler_type": "optimizer.schedule",
    "iters": "train.steps", "max_iters": "train.steps", "max_steps": "train.steps",
    "num_steps": "train.steps", "total_steps": "train.steps", "num_train_steps": "train.steps",
    "training_steps": "train.steps", "iterations": "train.steps", "train_iters": "train.steps",
    "epochs": "train.steps", "num_epochs": "train.steps", "num_train_epochs": "train.steps",
    "max_epochs": "train.steps", "tokens": "train.steps", "max_tokens": "train.steps",
    "grad_accum": "train.accumulation", "gradient_accumulation_steps": "train.accumulation",
    "grad_accum_steps": "train.accumulation", "accumulate_grad_batches": "train.accumulation",
    "dtype": "train.compute_dtype", "precision": "train.compute_dtype",
    "bf16": "train.compute_dtype", "fp16": "train.compute_dtype", "amp": "train.compute_dtype",
    "mixed_precision": "train.compute_dtype", "torch_dtype": "train.compute_dtype",
    "gradient_checkpointing": "train.remat", "activation_checkpointing": "train.remat",
    "checkpointing": "train.remat", "rematerialization": "train.remat",
    "eval_interval": "train.eval_every", "eval_steps": "train.eval_every",
    "eval_freq": "train.eval_every", "log_interval": "train.log_every",
    "logging_steps": "train.log_every", "save_steps": "train.checkpoint_every",
    "save_interval": "train.checkpoint_every", "save_every": "train.checkpoint_every",
    "ckpt_interval": "train.checkpoint_every", "save_total_limit": "train.keep_checkpoints",
    "wandb_project": "train.wandb", "time_limit": "train.max_seconds",
    "bs": "data.batch_size", "batch": "data.batch_size", "global_batch_size": "data.batch_size",
    "train_batch_size": "data.batch_size", "per_device_train_batch_size": "data.batch_size",
    "block_size": "data.seq_len", "context_length": "data.seq_len", "ctx_len": "data.seq_len",
    "n_ctx": "data.seq_len", "max_seq_len": "data.seq_len", "seq_length": "data.seq_len",
    "sequence_length": "data.seq_len", "max_seq_length": "data.seq_len", "context": "data.seq_len",
    "dataset": "data.source", "data_dir": "data.source", "data_path": "data.source",
    "corpus": "data.source", "train_data": "data.source", "tokenizer_path": "data.tokenizer",
    "n_layer": "model.num_layers", "n_layers": "model.num_layers", "layers": "model.num_layers",
    "num_hidden_layers": "model.num_layers", "depth": "model.num_layers",
    "n_head": "model.num_heads", "n_heads": "model.num_heads", "heads": "model.num_heads",
    "num_attention_heads": "model.num_heads", "n_kv_heads": "model.num_kv_heads",
    "n_kv_head": "model.num_kv_heads", "kv_heads": "model.num_kv_heads",
    "num_key_value_heads": "model.num_kv_heads", "n_embd": "model.d_model",
    "hidden_size": "model.d_model", "embed_dim": "model.d_model", "dim": "model.d_model",
    "hidden_dim": "model.d_model", "n_embed": "model.d_model", "width": "model.d_model",
    "d_ff": "model.mlp_ratio", "intermediate_size": "model.mlp_ratio",
    "ffn_dim": "model.mlp_ratio", "activation": "model.mlp", "hidden_act": "model.mlp",
    "rope_theta": "model.rotary_base", "rope_base": "model.rotary_base",
    "theta": "model.rotary_base", "sliding_window": "model.window",
    "tie_word_embeddings": "model.tie_embeddings", "bias": "model.use_bias",
    "max_position_embeddings": "model.max_length", "dropout_rate": "model.dropout",
    "pos_emb": "model.position", "random_seed": "seed", "rng_seed": "seed",
    "dp": "mesh.replica", "data_parallel": "mesh.replica", "tp": "mesh.tensor",
    "tensor_parallel": "mesh.tensor", "tensor_parallel_size": "mesh.tensor",
    "cp": "mesh.context", "context_parallel": "mesh.context", "ep": "mesh.expert",
    "zero": "mesh.fsdp",
}  # fmt: skip
