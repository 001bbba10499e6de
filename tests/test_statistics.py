import math

import pytest

from experiments.stats import Estimate, holm, p_value, power_law, t_cdf, t_quantile

stats = pytest.importorskip("scipy.stats")
SAMPLES = [[1.612, 1.608, 1.615], [0.2, -0.1, 0.05, 0.3, 0.15], [-0.004, -0.0031], [5.0, 5.1, 4.9, 5.2, 4.7, 5.05, 5.0]]


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 10, 29, 100])
def test_students_t_is_scipys(df):
    for t in (-30.0, -4.303, -1.0, 0.0, 0.3, 2.776, 12.7):
        assert t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), abs=1e-12)
    for p in (0.6, 0.95, 0.975, 0.9995):
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-9)


def test_students_t_by_hand():
    """One degree of freedom is Cauchy's distribution; the 97.5 % points of printed tables."""
    assert t_cdf(1.0, 1) == pytest.approx(0.75)
    assert [round(t_quantile(0.975, df), 3) for df in (1, 2, 3, 4)] == [12.706, 4.303, 3.182, 2.776]


@pytest.mark.parametrize("sample", SAMPLES)
def test_intervals_and_p_values_are_scipys(sample):
    estimate = Estimate.of(sample)
    low, high = stats.t.interval(0.95, len(sample) - 1, loc=sum(sample) / len(sample), scale=stats.sem(sample))
    assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))
    assert p_value(sample) == pytest.approx(stats.ttest_1samp(sample, 0).pvalue, abs=1e-12)
    assert (p_value(sample) < 0.05) == (estimate.low > 0 or estimate.high < 0)  # an interval and a test say the same


def test_paired_differences_are_scipys_paired_test():
    a, b = [1.61, 1.64, 1.60, 1.66], [1.60, 1.62, 1.595, 1.64]
    assert p_value([x - y for x, y in zip(a, b)]) == pytest.approx(stats.ttest_rel(a, b).pvalue)


def test_what_cannot_be_told():
    assert Estimate.of([1.5]).margin == math.inf and p_value([1.5]) == 1
    assert p_value([0.0, 0.0, 0.0]) == 1
    with pytest.raises(ValueError, match="nothing"):
        Estimate.of([])


def test_holm_by_hand():
    """Three comparisons: the smallest counts three times, the next twice; none gets below one that is smaller."""
    assert holm([0.01, 0.04, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_power_law():
    a, b = power_law([1e12, 1e13, 1e14], [4 * x**-0.05 for x in (1e12, 1e13, 1e14)])
    assert (a, b) == (pytest.approx(4), pytest.approx(0.05))
