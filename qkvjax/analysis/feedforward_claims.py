"""What a study of sharings x feed-forwards says about claims A14 and A18."""

from __future__ import annotations

from qkvjax.analysis.claim import Finding, losses
from qkvjax.analysis.statistics import Paired, paired
from qkvjax.analysis.summary import Row, Summary
from qkvjax.models.feedforward import parse_feed_forward


def combines_with_experts(summary: Summary) -> Finding | None:
    """A14: how much more a sharing costs among experts than without them, paired within seeds."""
    rows = _by_both(summary)
    found: dict[str, Paired] = {}
    for (sharing, mlp), row in rows.items():
        dense = parse_feed_forward(mlp).activation
        if sharing == "q-k-v" or parse_feed_forward(mlp).experts == 1:
            continue
        four = [rows.get((s, m)) for m in (dense, mlp) for s in ("q-k-v", sharing)]
        if None not in four:
            without, among = _gap(*four[:2]), _gap(*four[2:])
            result = paired(without, among)
            if result:
                found[row.label] = result
    return losses(summary, found, "gap among experts, minus the gap without") if found else None


def shared_feed_forwards(summary: Summary) -> Finding | None:
    """A18: three projections, with feed-forwards that share against those that do not."""
    rows = _by_both(summary)
    found: dict[str, Paired] = {}
    for (sharing, mlp), row in rows.items():
        kind = parse_feed_forward(mlp)
        base = rows.get((sharing, kind.activation))
        if sharing == "q-k-v" and base and (kind.tied or kind.layers > 1):
            result = paired(base.scores, row.scores)
            if result:
                found[row.label] = result
    return losses(summary, found, "against feed-forwards of their own") if found else None


def _by_both(summary: Summary) -> dict[tuple[str, str], Row]:
    """(sharing, feed-forward) -> row, of rows that differ from the baseline in nothing else."""
    return {
        (row.settings["model.sharing"], row.settings["model.mlp"]): row
        for row in summary.rows
        if {"model.sharing", "model.mlp"} <= row.settings.keys()
        and set(row.changed) <= {"model.sharing", "model.mlp"}
        and row.score is not None
    }


def _gap(base: Row, row: Row) -> dict[int, float]:
    """seed -> what `row` loses against `base`."""
    return {seed: row.scores[seed] - base.scores[seed] for seed in row.scores.keys() & base.scores}
