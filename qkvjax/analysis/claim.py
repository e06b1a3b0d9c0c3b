"""A claim about shared projections, what a study finds about it, and when that decides it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from qkvjax.analysis import formats
from qkvjax.analysis.statistics import Paired
from qkvjax.analysis.summary import Summary

SUPPORTED, CONTRADICTED = "supported", "contradicted"
CANT_TELL, NOT_MEASURED = "can't tell at this size", "not measured"
MIN_TOKENS_PER_PARAM = 10
HARDLY = 0.005  # of the bits
# Parameters that claims speak of.
SCOPES = {"any": None, "300m": (200e6, 400e6), "article": (100e6, 7e9)}


class Finding(NamedTuple):
    """What a study says about a claim: two texts for people, and the verdict in scope."""

    measured: str = formats.NONE
    interval: str = formats.NONE
    verdict: str = NOT_MEASURED


class Claim(NamedTuple):
    """One claim.

    Attributes:
      id: A... of the article, P... of the paper, F... of the authors' follow-ups.
      claim, measured_by, scope, score_pads: see claims.toml.
      decide: computes a Finding, or None where the study lacks what it needs; None when no
        study of this kind measures it.
    """

    id: str
    claim: str
    measured_by: str
    decide: Callable[[Summary], Finding | None] | None = None
    scope: str = "article"
    score_pads: bool | None = None


def in_scope(claim: Claim, summary: Summary) -> bool:
    """Whether this study may decide the claim at all (rules 1 to 3)."""
    if SCOPES[claim.scope] is None:
        return True
    size = summary.baseline.num_params or 0
    tokens = min((result.get("tokens") or 0 for result in summary.results), default=0)
    low, high = SCOPES[claim.scope]
    kind = claim.score_pads in (None, summary.score_pads)
    return low <= size <= high and tokens >= MIN_TOKENS_PER_PARAM * size and kind


def about(value: float, low: float | None, high: float | None, no_effect: float) -> str:
    """Rule 4 for a claim of "about `value`", given an interval."""
    if low is None or high is None:
        return CANT_TELL
    if not low <= value <= high:
        return CONTRADICTED
    return CANT_TELL if low <= no_effect <= high else SUPPORTED


def hardly_any(low: float | None, high: float | None) -> str:
    """The verdict on a loss that is said to be hardly any: less than HARDLY of the bits."""
    if high is not None and high < HARDLY:
        return SUPPORTED
    return CONTRADICTED if low is not None and low > HARDLY else CANT_TELL


def losses(
    summary: Summary, pairs: Mapping[str, Paired], what: str, verdict: str | None = None
) -> Finding:
    """What each variant loses, its interval, and a verdict: that on losses which are said to be
    hardly any, unless another is given.
    """
    spans = {
        label: [summary.relative(v) for v in (p.mean, p.low, p.high)] for label, p in pairs.items()
    }
    measured = [f"{label} {formats.percent(mean)}" for label, (mean, _, _) in spans.items()]
    intervals = [f"{label} {formats.percent_span(*span)}" for label, span in spans.items()]
    verdict = verdict or most([hardly_any(low, high) for _, low, high in spans.values()])
    return Finding(f"{what}:\n" + "\n".join(measured), "\n".join(intervals), verdict)


def most(verdicts: list[str]) -> str:
    """Supported or contradicted when more than half of the variants are."""
    for verdict in (SUPPORTED, CONTRADICTED):
        if 2 * verdicts.count(verdict) > len(verdicts):
            return verdict
    return CANT_TELL
