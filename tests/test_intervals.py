"""Bootstrap intervals: against a second implementation, coverage, pairing, refusals.

Needs no data. Run: pytest tests/test_intervals.py
"""

import numpy as np
import pytest
from scipy import stats

from modeling_scdiva.metrics.intervals import bootstrap_interval, paired_bootstrap_difference, ratio_of_sums


def test_equals_percentiles_of_resampled_means():
    values = np.random.default_rng(0).exponential(size=200)
    low, high = bootstrap_interval(values, n_resamples=4000, seed=1)
    rng = np.random.default_rng(2)
    means = [values[rng.integers(0, 200, 200)].mean() for _ in range(4000)]
    np.testing.assert_allclose([low, high], np.percentile(means, [2.5, 97.5]), atol=0.015)


@pytest.mark.parametrize("n_units", [12, 40])
def test_intervals_hold_the_truth_as_often_as_they_say(n_units):
    rng = np.random.default_rng(0)
    n_held = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.normal(3.0, 1.0, n_units), n_resamples=300, level=0.9, seed=trial)
        n_held += low <= 3.0 <= high
    assert 0.82 <= n_held / 200 <= 0.96


def test_higher_level_is_wider_and_seed_decides():
    values = np.random.default_rng(0).normal(size=50)
    narrow, wide = (bootstrap_interval(values, level=level) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_any_statistic():
    values = np.random.default_rng(0).normal(5.0, 1.0, 60)

    def spread(numbers):  # one number, without an axis
        return float(np.quantile(numbers, 0.75) - np.quantile(numbers, 0.25))

    low, high = bootstrap_interval(values, statistic=spread, n_resamples=300)
    assert low < spread(values) < high
    low, high = bootstrap_interval(values, statistic=np.median)
    assert low < np.median(values) < high
    found = paired_bootstrap_difference(values, values + 1, statistic=spread, n_resamples=100)
    assert found["difference"] == pytest.approx(0.0, abs=1e-12)


def test_ratio_of_sums_weighs_units_and_covers_the_truth():
    totals, counts = np.array([1.0, 9.0, 2.0]), np.array([1.0, 3.0, 4.0])
    statistic = ratio_of_sums(totals, counts)
    assert statistic(np.arange(3.0)) == pytest.approx(12 / 8)
    np.testing.assert_allclose(statistic(np.array([[0, 0, 1], [2, 2, 2]]), axis=-1), [11 / 5, 0.5])
    rng = np.random.default_rng(0)
    n_covered = 0
    for _ in range(100):
        counts = rng.integers(1, 20, 50)
        totals = np.array([rng.normal(2.0, 1.0, n).sum() for n in counts])
        low, high = bootstrap_interval(
            np.arange(50), statistic=ratio_of_sums(totals, counts), n_resamples=400
        )
        n_covered += low <= 2.0 <= high
    assert n_covered >= 86  # of 100 at 95 %; fewer happen once in ten thousand times


def test_equal_units_give_a_point():
    assert bootstrap_interval([0.7] * 5) == (0.7, 0.7)
    assert bootstrap_interval([0.7] * 50) == pytest.approx((0.7, 0.7))


def test_pairing_removes_what_units_share():
    rng = np.random.default_rng(0)
    units = rng.normal(0.0, 10.0, 40)
    first, second = units + 1.0 + rng.normal(0.0, 0.1, 40), units
    found = paired_bootstrap_difference(first, second)
    assert found["difference"] == pytest.approx(np.mean(first - second))
    assert found["n_units"] == 40
    assert 0.9 < found["difference_low"] < found["difference"] < found["difference_high"] < 1.1
    swapped = paired_bootstrap_difference(second, first)
    assert swapped["difference_low"] == pytest.approx(-found["difference_high"], abs=0.01)
    # The mean of differences is the difference of means: the same interval from the differences themselves.
    assert bootstrap_interval(first - second) == pytest.approx(
        (found["difference_low"], found["difference_high"]), abs=1e-9
    )


def test_small_samples_are_corrected_for_skewness():
    values = np.array([0.1, 0.2, 0.1, 0.3, 0.2, 4.0])
    found = bootstrap_interval(values, seed=5)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(5)
    ).confidence_interval
    assert found == pytest.approx((expected.low, expected.high))


def test_methods_that_differ_by_a_constant():
    found = paired_bootstrap_difference([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    bounds = [found[name] for name in ("difference", "difference_low", "difference_high")]
    assert bounds == pytest.approx([0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ([1.0], {}, "at least 2 units, got shape"),
        (np.zeros((3, 2)), {}, r"got shape \(3, 2\)"),
        ([1.0, np.nan], {}, "1 of 2 values are not finite"),
        ([1.0, 2.0], {"n_resamples": 0}, "n_resamples must be at least 1, got 0"),
        ([1.0, 2.0], {"level": 95}, "level must lie between 0 and 1, got 95"),
    ],
)
def test_impossible_requests(values, settings, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **settings)


def test_pairs_need_the_same_units():
    with pytest.raises(ValueError, match="first has 3 units and second 2"):
        paired_bootstrap_difference([1.0, 2.0, 3.0], [1.0, 2.0])
