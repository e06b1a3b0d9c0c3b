"""Simulated studies: how often a table of differences raises a false alarm or finds an effect."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qkvjax.report import critical_values, statistics
from qkvjax.report.statistics import BETTER, NOT_SHOWN, WORSE, compare


def frame(scores):
    """Returns a frame of runs from scores [variants, settings, seeds]; v0 is the baseline."""
    variant, setting, seed = np.indices(scores.shape).reshape(3, -1)
    return pd.DataFrame(
        {
            "label": [f"v{i}" for i in variant],
            "setting": [f"s{i}" for i in setting],
            "seed": seed,
            "score": scores.ravel(),
        }
    )


def pairs(baseline, other):
    """Returns a frame of two variants from seed -> score."""
    rows = [("base", seed, score) for seed, score in baseline.items()]
    rows += [("other", seed, score) for seed, score in other.items()]
    table = pd.DataFrame(rows, columns=["label", "seed", "score"])
    return table.assign(setting="")


def simulated(variants, settings, seeds, rng, interaction=0.0, effect=0.0, where=slice(1, None)):
    """Returns scores of a study: seeds and settings differ, and variants at `where` by `effect`.

    Args:
      interaction: standard deviation of a variant's gain in a setting, over that of the noise.
      effect: in standard errors of a difference over the units.
    """
    shape = (variants, settings, seeds)
    scores = 2 + rng.normal(0, 0.05, (1, 1, seeds)) + rng.normal(0, 0.3, (1, settings, 1))
    scores = scores + rng.normal(0, 0.01, shape)
    scores += 0.01 * interaction * rng.normal(size=(variants, settings, 1))
    variance = 2 * (interaction**2 + 1 / seeds) / settings
    scores[where] += effect * 0.01 * math.sqrt(variance)
    return scores


def alarms(studies, *args, **kwargs):
    """Returns the part of null studies that name some variant."""
    rng = np.random.default_rng(0)
    named = [
        (compare(frame(simulated(*args, rng, **kwargs)), "v0")["verdict"] != NOT_SHOWN).any()
        for _ in range(studies)
    ]
    return np.mean(named)


@pytest.mark.parametrize(
    ("variants", "settings", "seeds", "interaction"),
    [
        (4, 1, 3, 0),
        (4, 1, 12, 0),
        (20, 1, 3, 0),
        (20, 1, 12, 0),
        (6, 20, 3, 0.5),
        (6, 20, 3, 2),
        (5, 4, 3, 1),
        (4, 3, 12, 2),
    ],
)
def test_studies_without_a_difference_name_one_in_twenty_at_most(
    variants, settings, seeds, interaction
):
    """Bound: 5 % and three standard errors of the simulation."""
    studies = 120
    rate = alarms(studies, variants, settings, seeds, interaction=interaction)
    assert rate <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)


@pytest.mark.parametrize("settings, seeds", [(1, 3), (1, 12), (2, 12), (3, 3)])
@pytest.mark.parametrize("noisy", [0, 4], ids=["the baseline", "a variant"])
def test_what_varies_more_than_the_others_raises_no_alarm(settings, seeds, noisy):
    rng = np.random.default_rng(1)
    studies = 100
    named = 0
    for _ in range(studies):
        scores = rng.normal(2, 0.01, (5, settings, seeds))
        shape = (settings, 1) if settings > 1 else (1, seeds)
        scores[noisy] += rng.normal(0, 0.04, shape)
        named += (compare(frame(scores), "v0")["verdict"] != NOT_SHOWN).any()
    assert named <= studies * 0.05 + 3 * math.sqrt(studies * 0.05 * 0.95)


@pytest.mark.parametrize("seeds", [3, 8, 20])
def test_the_best_of_several_equals_is_rarely_called_better(seeds):
    rng = np.random.default_rng(8)
    studies = 100
    named = 0
    for _ in range(studies):
        table = statistics.compare_best(frame(rng.normal(2, 0.01, (5, 1, seeds))))
        named += (table["verdict"] == WORSE).any()
    assert named <= studies * 0.05 + 3 * math.sqrt(studies * 0.05 * 0.95)


def test_the_best_is_chosen_on_the_runs_that_all_have():
    """A variant that finished only the easy seeds is not the best for that."""
    easy = {0: 2.0, 1: 2.3, 2: 2.6, 3: 2.9}
    table = pairs(easy, {0: 2.05, 1: 2.34})
    result = statistics.compare_best(table)
    assert list(result.index) == ["base", "other"] and result["pairs"].iloc[1] == 2
    assert statistics.compare_best(pairs({0: 1.0}, {1: 1.0})) is None


@pytest.mark.parametrize("variants", [2, 4, 5])
def test_twelve_seeds_find_four_standard_errors_nine_times_in_ten(variants):
    rng = np.random.default_rng(2)
    detected = [
        (compare(frame(simulated(variants, 1, 12, rng, effect=4.0)), "v0")["verdict"] == WORSE)
        for _ in range(150)
    ]
    assert np.mean(detected) >= 0.9


def test_the_detectable_effect_is_found_four_times_in_five():
    rng = np.random.default_rng(3)
    for units in (3, 12):
        effect = critical_values.detectable(critical_values.dunnett(3, units - 1), units - 1)
        one = slice(1, 2)
        tables = [
            compare(frame(simulated(4, 1, units, rng, effect=effect, where=one)), "v0")
            for _ in range(150)
        ]
        power = np.mean([table.loc["v1", "verdict"] == WORSE for table in tables])
        assert power >= 0.65  # four times in five, in 150 simulations


@pytest.mark.parametrize("critical", [2.0, 4.3])
@pytest.mark.parametrize("degrees", [2, 11, 60])
def test_a_test_misses_the_detectable_effect_one_time_in_five(critical, degrees):
    """The statistic of an effect has the noncentral t distribution: its 20 % quantile is the
    critical value."""
    effect = critical_values.detectable(critical, degrees)
    assert stats.nct.ppf(0.20, degrees, effect) == pytest.approx(critical, rel=1e-6)


def test_critical_values_are_the_published_ones():
    """Dunnett (1964), two-sided, 5 %, as books reprint it."""
    for comparisons, degrees, value in ((2, 10, 2.57), (3, 20, 2.54), (4, 60, 2.51), (9, 20, 2.95)):
        assert critical_values.dunnett(comparisons, degrees) == pytest.approx(value, abs=0.015)
    assert critical_values.dunnett(1, 7) == pytest.approx(stats.t.ppf(0.975, 7))


def test_errors_are_pooled_over_variants_and_the_detectable_effect_is_of_the_larger_error():
    """Against a linear model of variants and seeds, whose degrees of freedom are what is left."""
    rng = np.random.default_rng(10)
    variants, seeds = 4, 6
    scores = simulated(variants, 1, seeds, rng)
    table = compare(frame(scores), "v0")
    variant, seed = np.indices((variants, seeds)).reshape(2, -1)
    factors = np.column_stack([variant[:, None] == range(variants), seed[:, None] == range(seeds)])
    solution, _, rank, _ = np.linalg.lstsq(factors.astype(float), scores.ravel(), rcond=None)
    residual = scores.ravel() - factors @ solution
    pooled = 2 * (residual**2).sum() / (variants * seeds - rank)
    for label, row in table.iterrows():
        gaps = scores[int(label[1:]), 0] - scores[0, 0]
        error = math.sqrt(max(gaps.var(ddof=1), pooled) / seeds)
        assert row["standard_error"] == pytest.approx(error)
        critical = critical_values.dunnett(variants - 1, seeds - 1)
        effect = critical_values.detectable(critical, seeds - 1)
        assert row["detectable"] == pytest.approx(effect * error)
    own_errors = (scores[1:, 0] - scores[0, 0]).std(axis=1, ddof=1) / math.sqrt(seeds)
    assert (table["standard_error"] > own_errors * 1.01).any()


@pytest.mark.parametrize("seeds", [6, 20])
def test_differences_from_the_best_are_corrected_for_all_pairs(seeds):
    rng = np.random.default_rng(9)
    variants = 4
    scores = rng.normal(2, 0.01, (variants, 1, seeds))
    table = statistics.compare_best(frame(scores))
    best = int(table.index[0][1:])
    assert best == scores.mean((1, 2)).argmin()
    for label, row in table.iloc[1:].iterrows():
        gaps = scores[int(label[1:]), 0] - scores[best, 0]
        own = stats.t.isf(0.025 / 6, seeds - 1) * gaps.std(ddof=1) / math.sqrt(seeds)  # 6 pairs
        pooled = 0.0
        if seeds < 16:
            critical = stats.studentized_range.ppf(0.95, variants, (variants - 1) * (seeds - 1))
            pooled = critical / math.sqrt(2) * row["standard_error"]
        assert row["high"] - row["difference"] == pytest.approx(max(own, pooled))


def test_settings_are_clusters():
    """Seeds of a setting are one observation, however many there are."""
    rng = np.random.default_rng(4)
    scores = rng.normal(2, 0.1, (3, 5, 1)) + np.zeros((3, 5, 50))
    scores += rng.normal(0, 1e-6, scores.shape)
    table = compare(frame(scores), "v0")
    assert set(table["units"]) == {5} and set(table["pairs"]) == {250}
    means = compare(frame(scores.mean(2, keepdims=True)), "v0")
    np.testing.assert_allclose(table["low"], means["low"])


def test_identical_runs_differ_by_exactly_zero():
    scores = {0: 2.1, 1: 2.2, 2: 2.3}
    row = compare(pairs(scores, dict(scores)), "base").loc["other"]
    assert (row["difference"], row["low"], row["high"], row["units"]) == (0.0, 0.0, 0.0, 3)
    assert row["verdict"] == NOT_SHOWN and row["ceiling"] and not row["equivalent"]
    assert statistics.units_needed(row, 1) is None


def test_half_of_the_pairs_exactly_equal_is_a_ceiling():
    base = dict.fromkeys(range(8), 0.0)
    different = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 4: 0.5}
    for count, ceiling in ((3, True), (4, True), (5, False)):
        some = {seed: different[seed] for seed in range(count)}
        row = compare(pairs(base, base | some), "base").loc["other"]
        assert row["ties"] == 8 - count and row["ceiling"] == ceiling
    other = {seed: 0.1 + seed / 100 for seed in range(8)}
    assert not compare(pairs(base, other), "base").loc["other", "ceiling"]


def test_one_seed_claims_nothing():
    row = compare(pairs({0: 2.0}, {0: 9.0}), "base").loc["other"]
    assert row["difference"] == 7.0 and math.isnan(row["low"]) and row["verdict"] == NOT_SHOWN
    assert math.isnan(row["detectable"]) and statistics.units_needed(row, 1) is None


def test_differences_equal_to_the_last_bit_claim_nothing():
    """Seeds that change nothing are one seed, however often it is run."""
    row = compare(pairs({0: 2.0, 1: 2.0, 2: 2.0}, {0: 2.5, 1: 2.5, 2: 2.5}), "base").loc["other"]
    assert row["difference"] == 0.5 and math.isnan(row["low"]) and row["verdict"] == NOT_SHOWN


def test_only_common_seeds_are_compared():
    table = compare(pairs({0: 1.0, 1: 2.0, 2: 3.0}, {1: 2.1, 2: 3.3, 7: 9.0}), "base")
    assert table.loc["other", "units"] == 2
    assert table.loc["other", "difference"] == pytest.approx(0.2)
    assert not len(compare(pairs({0: 1.0}, {1: 1.0}), "base"))


def test_lower_is_better():
    row = compare(pairs({0: 2.0, 1: 2.1, 2: 2.2}, {0: 1.9, 1: 2.0001, 2: 2.1001}), "base")
    assert row.loc["other", "verdict"] == BETTER and row.loc["other", "high"] < 0


def test_equivalence_needs_the_whole_interval_inside_the_margin():
    rng = np.random.default_rng(5)
    scores = simulated(2, 1, 12, rng)
    wide = compare(frame(scores), "v0", margin=0.1).loc["v1"]
    tight = compare(frame(scores), "v0", margin=0.0005).loc["v1"]
    assert wide["equivalent"] and not tight["equivalent"]
    assert wide["verdict"] == tight["verdict"] == NOT_SHOWN


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20))
def test_intervals_agree_with_scipy(values):
    mean, low, high = statistics.interval(values)
    error = stats.sem(values)
    if error > 1e-9:
        expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
        assert (low, high) == pytest.approx(expected)
    assert low <= mean <= high


def test_one_comparison_is_the_paired_t_test():
    rng = np.random.default_rng(6)
    base, other = rng.normal(2, 0.1, (2, 7))
    row = compare(pairs(dict(enumerate(base)), dict(enumerate(other))), "base").loc["other"]
    expected = stats.ttest_rel(other, base).confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))


def test_one_value_has_no_interval():
    mean, low, high = statistics.interval([3.0])
    assert mean == 3.0 and math.isnan(low) and math.isnan(high)


def test_units_needed_would_separate_the_difference():
    rng = np.random.default_rng(3)
    base = dict.fromkeys(range(5), 0.0)
    row = compare(pairs(base, dict(enumerate(rng.normal(0.01, 0.02, 5)))), "base").loc["other"]
    needed = statistics.units_needed(row, 1)
    spread = row["standard_error"] * math.sqrt(5)

    def reach(units):
        critical = stats.t.ppf(0.975, units - 1)
        return critical_values.detectable(critical, units - 1) * spread / math.sqrt(units)

    assert reach(needed) <= abs(row["difference"]) < reach(needed - 1)
    assert statistics.units_needed(row, 1, margin=row["difference"] + 1e-9) is None  # too close


def test_the_bootstrap_covers_the_sampling_of_documents():
    """Of 200 test sets, the interval misses the true difference in about 5 %."""
    rng = np.random.default_rng(7)
    missed = 0
    for _ in range(200):
        weights = rng.integers(50, 500, 60).astype(float)
        common = rng.normal(2, 0.5, 60)
        ours = common + 0.1 + rng.normal(0, 0.2, 60)
        values = np.stack([common * weights, ours * weights])
        _, low, high = statistics.bootstrap_items(values, weights, draws=400)
        missed += not low <= 0.1 <= high
    assert missed <= 200 * 0.05 + 3 * math.sqrt(200 * 0.05 * 0.95)


def test_the_bootstrap_is_corrected_for_several_intervals():
    """Five intervals have 99 % each: wider than one of 95 % as normal quantiles are."""
    rng = np.random.default_rng(11)
    values = rng.normal(2, 0.5, (2, 200))
    widths = []
    for comparisons in (1, 5):
        _, low, high = statistics.bootstrap_items(values, np.ones(200), comparisons, draws=6000)
        widths.append(high - low)
    expected = stats.norm.isf(0.005) / stats.norm.isf(0.025)
    assert widths[1] / widths[0] == pytest.approx(expected, abs=0.07)
