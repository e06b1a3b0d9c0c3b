"""Which rows of a study isolate a sharing, and what the literature says about each."""

from __future__ import annotations

import math

from qkvjax.analysis.summary import Row, Summary
from qkvjax.config import flatten

# arXiv 2606.04032, table of the 300M models: perplexity with padding scored.
PAPER_PERPLEXITY = {"q-k=v": 1.031, "q=k-v": 1.049, "q=k=v": 1.254}
PAPER_BASELINE_NATS = 1.63
# The authors' rerun with padding masked (FineWeb-Edu, 300M, one seed): QKV and Q-K=V.
MASKED_PERPLEXITIES = (20.8183, 21.2798)


def paper_bits(sharing: str) -> float:
    """The paper's 300M gap as a part of the baseline's bits: ln(ratio) / loss."""
    return math.log(PAPER_PERPLEXITY[sharing]) / PAPER_BASELINE_NATS


def masked_bits() -> float:
    """The masked rerun's gap of Q-K=V as a part of the baseline's bits."""
    base, tied = MASKED_PERPLEXITIES
    return math.log(tied / base) / math.log(base)


def field(summary: Summary, row: Row, name: str):
    """The value of a config field at a row, overridden or not; None when unknown."""
    return row.settings.get(name, flatten(summary.study.get("config") or {}).get(name))


def is_sharing_study(summary: Summary) -> bool:
    """Whether some row differs in its sharing from a baseline with three projections."""
    three = field(summary, summary.baseline, "model.sharing") == "q-k-v"
    return three and any("model.sharing" in row.changed for row in summary.others)


def pure(summary: Summary, sharing: str) -> Row | None:
    """The row that differs from a three-projection baseline in this sharing alone."""
    if field(summary, summary.baseline, "model.sharing") != "q-k-v":
        return None
    rows = [row for row in summary.others if row.changed == {"model.sharing": sharing}]
    return rows[0] if rows else None


def pure_rows(summary: Summary) -> list[Row]:
    """The compared rows that differ from a three-projection baseline in their sharing alone."""
    return [row for row in summary.compared
            if row is pure(summary, row.changed.get("model.sharing", ""))]  # fmt: skip


def is_uniform(summary: Summary) -> bool:
    """Whether every layer has the same heads and sharing (no layer_overrides)."""
    return not any(field(summary, row, "model.layer_overrides") for row in summary.rows)
