"""The model of `ours.config_of` in plain PyTorch, called the twin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sizes import Size
from torch import nn


class Block(nn.Module):
    """Pre-norm attention and feed-forward without biases, on x [B, T, D]."""

    def __init__(self, size: Size):
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        roles = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        q, k, v = (role.unflatten(-1, (self.heads, -1)).transpose(1, 2) for role in roles)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Twin(nn.Module):
    """Token and position tables, blocks, norm, tied head; its output is the cross-entropy."""

    def __init__(self, size: Size):
        super().__init__()
        self.embedding = nn.Embedding(size.vocab, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width, bias=False)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=size.width**-0.5)

    def forward(self, inputs, targets):
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        width = self.norm.weight.numel()
        x = self.embedding(inputs) * width**0.5 + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.embedding.weight.T
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def train_call(size: Size, dtype: str, compiled: bool):
    """Returns a function that runs one step: forward, backward, clipping, AdamW.

    Args:
      size: of the model and its batch.
      dtype: "bfloat16" for autocast, else float32.
      compiled: whether to use torch.compile.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Twin(size).to(device)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda"
    )
    ids = torch.randint(0, size.vocab, (size.batch, size.length + 1), device=device)
    inputs = ids[:, :-1].contiguous()
    targets = ids[:, 1:].contiguous()

    def call():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = run(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return call
