"""experiments/stats.py against scipy's own tests, printed tables and numbers worked out by hand."""
import math

import numpy as np
import pytest
from scipy import stats

from experiments.stats import (
    Estimate,
    holm,
    p_value,
    pairs_needed,
    parabola_minimum,
    power,
    power_law,
    proportion_interval,
    sum_of_means,
)

SAMPLES = [[1.612, 1.608, 1.615], [0.2, -0.1, 0.05, 0.3, 0.15], [-0.004, -0.0031], [5.0, 5.1, 4.9, 5.2, 4.7, 5.05, 5.0]]


@pytest.mark.parametrize("sample", SAMPLES)
def test_interval_and_p_value_equal_scipys(sample):
    estimate = Estimate.from_values(sample)
    low, high = stats.t.interval(0.95, len(sample) - 1, loc=sum(sample) / len(sample), scale=stats.sem(sample))
    assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))
    assert p_value(sample) == pytest.approx(stats.ttest_1samp(sample, 0).pvalue, abs=1e-12)
    assert (p_value(sample) < 0.05) == (estimate.low > 0 or estimate.high < 0)  # interval and test agree


@pytest.mark.parametrize("n, quantile", [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776)])
def test_margin_by_printed_tables(n, quantile):
    values = [0.0] * (n - 1) + [1.0]
    deviation = math.sqrt(1 / n)  # of n - 1 zeros and a one
    margin = quantile * deviation / math.sqrt(n)
    assert Estimate.from_values(values).margin == pytest.approx(margin, rel=2e-4)  # tables have three decimals


def test_interval_of_a_proportion_by_hand():
    # 1.96² = 3.8415; of none, up to 3.8415 / (10 + 3.8415); of a half, 0.5 ± 1.96 √(10 / 4 + 3.8415 / 4) / (10 + 3.8415)
    assert proportion_interval(0, 10) == (0, pytest.approx(0.27753, abs=1e-4))
    assert proportion_interval(10, 10) == (pytest.approx(0.72247, abs=1e-4), 1)
    assert proportion_interval(5, 10) == (pytest.approx(0.23659, abs=1e-4), pytest.approx(0.76341, abs=1e-4))


def test_p_value_of_differences_is_the_paired_test():
    a, b = [1.61, 1.64, 1.60, 1.66], [1.60, 1.62, 1.595, 1.64]
    assert p_value([x - y for x, y in zip(a, b)]) == pytest.approx(stats.ttest_rel(a, b).pvalue)


def test_degenerate_samples():
    assert Estimate.from_values([1.5]).margin == math.inf and p_value([1.5]) == 1
    assert p_value([0.0, 0.0, 0.0]) == 1 and p_value([0.5, 0.5]) == 0
    with pytest.raises(ValueError, match="at least one"):
        Estimate.from_values([])


def test_holm_by_hand():
    """Of three: the smallest counts three times, the next twice; none gets below a smaller one."""
    assert holm([0.01, 0.04, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("effect, n", [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_pairs_by_printed_tables(effect, n):
    """For a power of 80 % and two sides (Cohen 1988; G*Power)."""
    assert pairs_needed(2.0, 2.0 * effect) == n
    assert power(n - 1, 2.0, 2.0 * effect) < 0.8 <= power(n, 2.0, 2.0 * effect)


@pytest.mark.parametrize("n, difference, alpha", [(2, 3.0, 0.05), (4, 1.5, 0.05), (9, 1.0, 0.025), (5, 0.0, 0.05)])
def test_power_equals_a_simulation(n, difference, alpha):
    samples = np.random.default_rng(0).normal(difference, 1.3, size=(4000, n))
    found = np.mean([p_value(sample.tolist()) < alpha for sample in samples])
    expected = power(n, 1.3, difference, alpha)
    assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 4000) ** 0.5 + 1e-9)


def test_sum_of_means_is_welchs_test():
    """Of the difference of two means: one of them with the other sign."""
    a, b = SAMPLES[0], SAMPLES[1]
    found, p = sum_of_means([a, [-x for x in b]])
    welch = stats.ttest_ind(a, b, equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert p == pytest.approx(welch.pvalue, abs=1e-12)
    assert sum_of_means([[1.0, 1.0], [2.0, 2.0]]) == (Estimate(3.0, 0.0, 2), 0.0)
    assert sum_of_means([[1.0, 2.0], [2.0]]) == (Estimate(3.5, math.inf, 1), 1.0)


def test_minimum_of_a_parabola():
    assert parabola_minimum([1, 2, 4, 5], [(x - 3.5) ** 2 + 7 for x in (1, 2, 4, 5)]) == pytest.approx((3.5, 7))
    for ys in ([1, 2, 3.5], [1, 3, 2], [1, 1, 1]):  # beyond the points, a maximum, none
        assert all(map(math.isnan, parabola_minimum([1, 2, 3], ys)))


def test_power_law_recovers_its_parameters():
    a, b = power_law([1e12, 1e13, 1e14], [4 * x**-0.05 for x in (1e12, 1e13, 1e14)])
    assert (a, b) == (pytest.approx(4), pytest.approx(0.05))
