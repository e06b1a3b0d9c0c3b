"""Figures that others have published, to stand beside those of a study."""

from __future__ import annotations

import math
from typing import NamedTuple

from qkvjax.report.summary import Summary


class Published(NamedTuple):
    """One of the paper's models of 300M parameters with 16 query heads, trained once.

    Attributes:
      sharing: as in `model.sharing`.
      kv_heads: number of key-value heads.
      perplexity: on validation data, with padding scored.
      cache: as a part of QKV's cache.
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
PAPER_NATS = 1.63  # the loss of QKV in the paper
# The authors' rerun with padding masked (FineWeb-Edu, 300M, one seed): QKV and Q-K=V.
MASKED_PERPLEXITIES = (20.8183, 21.2798)


def paper_bits(label: str) -> float:
    """Returns the paper's gap to QKV as a part of QKV's bits: ln(ratio of perplexities) / loss.

    Args:
      label: a key of PAPER.
    """
    return math.log(PAPER[label].perplexity / PAPER["QKV"].perplexity) / PAPER_NATS


def masked_bits() -> float:
    """Returns the gap of Q-K=V to QKV in the masked rerun, as a part of QKV's bits."""
    base, tied = MASKED_PERPLEXITIES
    return math.log(tied / base) / math.log(base)


def is_sharing_study(summary: Summary) -> bool:
    """Tells whether some variant differs in its sharing from a baseline with three projections."""
    separate = summary.field(summary.baseline, "model.sharing") == "q-k-v"
    return separate and any("model.sharing" in fields for fields in summary.changes.values())


def pure(summary: Summary, sharing: str) -> str | None:
    """Returns the label of the variant that differs from a baseline with three projections in this
    sharing alone; None without such a variant."""
    if not is_sharing_study(summary):
        return None
    for label, fields in summary.changes.items():
        if fields == {"model.sharing": sharing}:
            return label
    return None


def beside(summary: Summary) -> list[dict]:
    """Returns the paper's figures beside those of a study, for the variants that both have.

    Returns:
      A dict for each variant: label, name (in the paper), ours and theirs: differences from QKV as
      parts of its bits. Empty for a study that is not about text.
    """
    if not is_sharing_study(summary) or not summary.metric.relative:
        return []
    rows = []
    for label, row in summary.compared.iterrows():
        name = _name_in_paper(summary, label)
        if name is not None:
            ours = summary.relative(row["difference"])
            rows.append({"label": label, "ours": ours, "name": name, "theirs": paper_bits(name)})
    return rows


def _name_in_paper(summary: Summary, label: str) -> str | None:
    """Returns the paper's name of a variant; None if it differs in more than sharing and heads."""
    fields = summary.changes[label]
    if not fields or not fields.keys() <= {"model.sharing", "model.num_kv_heads"}:
        return None
    heads = summary.field(label, "model.num_heads")
    kv_heads = summary.field(label, "model.num_kv_heads") or heads
    sharing = summary.field(label, "model.sharing")
    for name, model in PAPER.items():
        if sharing == model.sharing and kv_heads * 16 == model.kv_heads * heads:
            return name
    return None
