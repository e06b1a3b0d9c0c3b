"""A claim about shared projections, what a study finds about it, and when that decides it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from qkvjax.analysis import formats
from qkvjax.analysis.statistics import Paired
from qkvjax.analysis.summary import Summary

SUPPORTED, CONTRADICTED = "supported", "contradicted"
CANT_TELL, NOT_MEASURED = "can't tell at this size", "not measured"
MIN_TOKENS_PER_PARAM = 10
HARDLY = 0.005  # of the bits
AT_300M, ARTICLE = (200e6, 400e6), (100e6, 7e9)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a study says about a claim: two texts for people, and the verdict in scope."""

    measured: str = formats.NONE
    interval: str = formats.NONE
    verdict: str = NOT_MEASURED


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
      id, source: A the article, P the paper, F the authors' follow-ups.
      claim, measured_by: texts.
      decide: computes a Finding, or None where the study lacks what it needs; None when no
        study of this kind measures it.
      sizes: parameters the claim speaks of; None for exact arithmetic.
      pads: whether padding was scored where the figure comes from; None when it does not say.
    """

    id: str
    source: str
    claim: str
    measured_by: str
    decide: Callable[[Summary], Finding | None] | None = None
    sizes: tuple[float, float] | None = ARTICLE
    pads: bool | None = None


def in_scope(claim: Claim, summary: Summary) -> bool:
    """Whether this study may decide the claim at all (rules 1 to 3)."""
    if claim.sizes is None:
        return True
    size = summary.baseline.num_params or 0
    tokens = min((result.get("tokens") or 0 for result in summary.results), default=0)
    low, high = claim.sizes
    kind = claim.pads is None or claim.pads == summary.score_pads
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
