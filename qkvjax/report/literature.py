"""What others have measured, to stand beside a study."""

from __future__ import annotations

import math
from typing import NamedTuple

from qkvjax.report.summary import Summary


class Published(NamedTuple):
    """A variant of the paper's 300M models: perplexity with padding scored, one run each.

    Attributes:
      sharing, kv_heads: of 16 query heads.
      perplexity: on validation data.
      cache: part of QKV's cache.
    """

    sharing: str
    kv_heads: int
    perplexity: float
    cache: float


# Kayyam et al. 2026 (arXiv 2606.04032), language models of 300M parameters.
PAPER = {
    "QKV": Published("q-k-v", 16, 5.11, 1.0),
    "Q-K=V": Published("q-k=v", 16, 5.27, 0.5),
    "Q=K-V": Published("q=k-v", 16, 5.36, 1.0),
    "Q=K=V": Published("q=k=v", 16, 6.41, 0.5),
    "GQA-4": Published("q-k-v", 4, 5.15, 0.25),
    "MQA": Published("q-k-v", 1, 5.19, 0.0625),
    "Q-GQA-4": Published("q-k=v", 4, 5.32, 0.125),
    "Q-MQA": Published("q-k=v", 1, 5.36, 0.03125),
}
PAPER_NATS = 1.63  # the loss of its QKV
# The authors' rerun with padding masked (FineWeb-Edu, 300M, one seed): QKV and Q-K=V.
MASKED_PERPLEXITIES = (20.8183, 21.2798)


def paper_bits(label: str) -> float:
    """Returns the paper's gap to QKV as a part of the bits: ln(ratio of perplexities) / loss."""
    return math.log(PAPER[label].perplexity / PAPER["QKV"].perplexity) / PAPER_NATS


def masked_bits() -> float:
    """Returns the masked rerun's gap of Q-K=V as a part of the baseline's bits."""
    base, tied = MASKED_PERPLEXITIES
    return math.log(tied / base) / math.log(base)


def is_sharing_study(summary: Summary) -> bool:
    """Tells whether some variant differs in its sharing from a baseline with three projections."""
    three = summary.field(summary.baseline, "model.sharing") == "q-k-v"
    return three and any("model.sharing" in changed for changed in summary.changes.values())


def pure(summary: Summary, sharing: str) -> str | None:
    """Returns the label that differs from a three-projection baseline in this sharing alone."""
    if not is_sharing_study(summary):
        return None
    wanted = {"model.sharing": sharing}
    return next((label for label, c in summary.changes.items() if c == wanted), None)


def beside(summary: Summary) -> list[dict]:
    """Returns the paper's figures for the variants that a study has: label, ours and theirs, as
    parts of the bits. Empty for a study that is not about text."""
    if not is_sharing_study(summary) or not summary.metric.relative:
        return []
    rows = []
    for label, row in summary.compared.iterrows():
        name = _published(summary, label)
        if name is not None:
            ours = summary.relative(row["difference"])
            rows.append({"label": label, "ours": ours, "name": name, "theirs": paper_bits(name)})
    return rows


def _published(summary: Summary, label: str) -> str | None:
    """Returns the paper's name of a variant that differs in sharing and heads alone."""
    changed = summary.changes[label]
    if not changed or not changed.keys() <= {"model.sharing", "model.num_kv_heads"}:
        return None
    heads = summary.field(label, "model.num_heads")
    kv_heads = summary.field(label, "model.num_kv_heads") or heads
    sharing = summary.field(label, "model.sharing")
    for name, one in PAPER.items():
        if sharing == one.sharing and kv_heads * 16 == one.kv_heads * heads:
            return name
    return None
