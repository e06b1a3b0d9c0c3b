"""Critical values for several comparisons, and the effect that a test detects."""

from __future__ import annotations

import functools
import math

import numpy as np

LEVEL = 0.95  # of intervals
POWER = 0.8  # probability that a detectable difference is found


@functools.cache
def dunnett(comparisons: int, degrees: float, level: float = LEVEL) -> float:
    """Returns Dunnett's two-sided critical value for comparisons with one baseline.

    It is the c with P(max_i |T_i| <= c) = level, where T_i = (Z_i - Z_0) / (sqrt(2) S), the Z are
    standard normal and S^2 is a chi-square over its degrees of freedom. The probability is
    integrated over Z_0 (Gauss-Hermite) and S (equally likely quantiles).

    Args:
      comparisons: number of variants beside the baseline, at least 1.
      degrees: degrees of freedom of the pooled variance, above 0.
      level: probability that all intervals together cover the true differences.
    """
    from scipy import optimize, stats

    if comparisons == 1:
        return bonferroni(1, degrees, level)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    parts = (np.arange(400) + 0.5) / 400
    spread = np.sqrt(stats.chi2.ppf(parts, degrees) / degrees)[:, None]

    def excess(value: float) -> float:
        reach = math.sqrt(2) * value * spread
        inside = stats.norm.cdf(nodes + reach) - stats.norm.cdf(nodes - reach)
        return float((inside**comparisons @ weights).mean()) - level

    low = bonferroni(1, degrees, level) * 0.99
    high = bonferroni(comparisons, degrees, level) * 1.01
    return optimize.brentq(excess, low, high)


@functools.cache
def bonferroni(comparisons: int, degrees: float, level: float = LEVEL) -> float:
    """Returns the two-sided critical value of Student's t for one of several comparisons."""
    from scipy import stats

    return float(stats.t.isf((1 - level) / 2 / comparisons, degrees))


@functools.cache
def tukey(variants: int, degrees: float, level: float = LEVEL) -> float:
    """Returns the two-sided critical value for all pairs of variants: the studentized range."""
    from scipy import stats

    return float(stats.studentized_range.ppf(level, variants, degrees)) / math.sqrt(2)


@functools.cache
def detectable(critical: float, degrees: float) -> float:
    """Returns how many standard errors a true difference must have to be found with POWER."""
    from scipy import optimize, stats

    def excess(effect: float) -> float:
        missed = stats.nct.cdf(critical, degrees, effect)
        return missed - (1 - POWER)

    return optimize.brentq(excess, 0.0, 3 * critical + 20)
