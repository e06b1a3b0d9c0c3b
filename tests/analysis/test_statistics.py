import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qkvjax.analysis import statistics
from qkvjax.analysis.statistics import BETTER, NOT_SHOWN, WORSE, mean_interval, paired

STUDIES = 4000


def simulate(n, effect, seed=0):
    """Verdicts of STUDIES simulated studies with n seeds; effect in standard errors."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(2.0, 0.05, (STUDIES, n))  # what both variants have of a seed
    a, b = shared + rng.normal(0, 0.01, (2, STUDIES, n))
    b = b + effect * 0.01 * np.sqrt(2 / n)
    return [
        paired(dict(enumerate(x)), dict(enumerate(y))).verdict
        for x, y in zip(a.tolist(), b.tolist())
    ]


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_equal_variants_are_rarely_called_different(n):
    alarms = np.mean([verdict != NOT_SHOWN for verdict in simulate(n, effect=0.0)])
    assert 0.02 <= alarms <= 0.08


def test_twelve_seeds_find_four_standard_errors():
    found = simulate(12, effect=4.0)
    assert found.count(WORSE) >= 0.90 * STUDIES
    assert found.count(BETTER) == 0


def test_the_detectable_effect_is_found_four_times_in_five():
    for n in (3, 12):
        found = simulate(n, effect=float(statistics.detectable(n)), seed=1)
        assert 0.76 <= found.count(WORSE) / STUDIES <= 0.92


def test_identical_runs_differ_by_exactly_zero():
    scores = {0: 2.1, 1: 2.2, 2: 2.3}
    result = paired(scores, dict(scores))
    assert (result.mean, result.low, result.high, result.n) == (0.0, 0.0, 0.0, 3)
    assert result.verdict == NOT_SHOWN and statistics.seeds_needed(result) is None


def test_one_seed_claims_nothing():
    result = paired({0: 2.0}, {0: 9.0})
    assert result.mean == 7.0 and result.low is None and result.verdict == NOT_SHOWN
    assert result.smallest_detectable_effect is None and statistics.seeds_needed(result) is None


def test_differences_equal_to_the_last_bit_claim_nothing():
    # Seeds that change nothing are one seed, however often it is run.
    result = paired({0: 2.0, 1: 2.0, 2: 2.0}, {0: 2.5, 1: 2.5, 2: 2.5})
    assert result.mean == 0.5 and result.low is None and result.verdict == NOT_SHOWN


def test_only_common_seeds_are_compared():
    result = paired({0: 1.0, 1: 2.0, 2: 3.0}, {1: 2.1, 2: 3.3, 7: 9.0})
    assert result.n == 2 and result.mean == pytest.approx(0.2)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_lower_is_better():
    better = paired({0: 2.0, 1: 2.1, 2: 2.2}, {0: 1.9, 1: 2.0001, 2: 2.1001})
    assert better.verdict == BETTER and better.high < 0


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20))
def test_intervals_agree_with_scipy(values):
    interval = mean_interval(values)
    error = stats.sem(values)
    if error > 1e-9:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
        assert interval.low == pytest.approx(low) and interval.high == pytest.approx(high)
    assert interval.low <= interval.mean <= interval.high


def test_one_value_has_no_interval():
    assert mean_interval([3.0]) == statistics.Interval(3.0, None, None, 1)


def test_seeds_needed_would_separate_the_difference():
    rng = np.random.default_rng(3)
    differences = rng.normal(0.01, 0.02, 5)
    zeros = dict.fromkeys(range(5), 0.0)
    result = paired(zeros, dict(enumerate(differences.tolist())))
    needed = statistics.seeds_needed(result)
    spread = differences.std(ddof=1)
    assert statistics.detectable(needed) * spread / np.sqrt(needed) <= abs(result.mean)
    fewer = needed - 1
    assert statistics.detectable(fewer) * spread / np.sqrt(fewer) > abs(result.mean)
    assert statistics.seeds_needed(result, margin=result.mean + 1e-9) is None  # too close
