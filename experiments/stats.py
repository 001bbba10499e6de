"""Statistics of a few measurements: confidence intervals, paired tests, Holm's correction, power laws.

    Estimate.from_values([1.612, 1.608, 1.615])     the mean and its 95 % interval
    p_value([a - b for a, b in pairs])              the paired t-test

Distributions are scipy's, which is imported at the first use: it takes most of a second.
"""
import math
import statistics
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval, mean ± margin; the margin of a single value is infinite."""
    mean: float
    margin: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.margin

    @property
    def high(self) -> float:
        return self.mean + self.margin

    @classmethod
    def from_values(cls, values: list[float]) -> "Estimate":
        """Student's t interval of independent, roughly normal values. Raises ValueError when there are none."""
        if not values:
            raise ValueError("an estimate needs at least one value")
        if len(values) == 1:
            return cls(values[0], math.inf, 1)
        from scipy.stats import t
        n = len(values)
        standard_error = statistics.stdev(values) / math.sqrt(n)
        return cls(statistics.mean(values), float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * standard_error, n)


def proportion_interval(n_hits: int, n: int) -> tuple[float, float]:
    """Interval of a fraction of `n` independent trials; not empty where all are hits, or none. Source: Wilson 1927, Journal
    of the American Statistical Association 22."""
    from scipy.stats import binomtest
    interval = binomtest(n_hits, n).proportion_ci(CONFIDENCE, "wilson")
    return float(interval.low), float(interval.high)


def p_value(values: list[float]) -> float:
    """Two-sided one-sample t-test of the mean being 0; of paired differences, the paired t-test. 1 for fewer than two."""
    if len(values) < 2:
        return 1.0
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    if deviation == 0:  # t is not defined
        return 1.0 if mean == 0 else 0.0
    from scipy.stats import t
    return float(2 * t.sf(abs(mean) / deviation * math.sqrt(len(values)), len(values) - 1))


def sum_of_means(samples: list[list[float]]) -> tuple[Estimate, float]:
    """The sum of the means of independent samples with its interval, and the p-value of its being 0: Welch's t-test, with
    the degrees of freedom of Satterthwaite. n is that of the smallest; with a single value the margin is infinite."""
    mean, n = sum(map(statistics.mean, samples)), min(map(len, samples))
    if n < 2:
        return Estimate(mean, math.inf, n), 1.0
    parts = [(statistics.variance(values) / len(values), len(values) - 1) for values in samples]
    variance = sum(part for part, _ in parts)
    if variance == 0:  # t is not defined
        return Estimate(mean, 0.0, n), 1.0 if mean == 0 else 0.0
    from scipy.stats import t
    freedom, error = variance ** 2 / sum(part ** 2 / own for part, own in parts), math.sqrt(variance)
    margin = float(t.ppf(0.5 + CONFIDENCE / 2, freedom)) * error
    return Estimate(mean, margin, n), float(2 * t.sf(abs(mean) / error, freedom))


def power(n: int, deviation: float, difference: float, alpha: float = 1 - CONFIDENCE) -> float:
    """The probability that `p_value` of `n` differences is below alpha, if they are normal with mean `difference` and this
    standard deviation."""
    if n < 2:
        return 0.0
    from scipy.stats import nct, t
    limit, shift = t.ppf(1 - alpha / 2, n - 1), abs(difference) / deviation * math.sqrt(n)
    return float(nct.sf(limit, n - 1, shift) + nct.cdf(-limit, n - 1, shift))


def pairs_needed(deviation: float, difference: float, alpha: float = 1 - CONFIDENCE, wanted: float = 0.8) -> int:
    """The least number of pairs whose `power` is `wanted`, at least 2."""
    high = 2
    while power(high, deviation, difference, alpha) < wanted:
        high *= 2
    low = high // 2  # too few, or 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, deviation, difference, alpha) >= wanted else (middle, high)
    return high


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for multiple comparisons (family-wise error rate), in the order given.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def parabola_minimum(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """(x, y) of the minimum of the parabola that fits three or more points best; NaNs if it has none between them."""
    import numpy as np
    a, b, c = np.polyfit(xs, ys, 2)
    lowest = -b / (2 * a) if a > 0 else math.nan
    return (float(lowest), float(c - b * b / (4 * a))) if min(xs) < lowest < max(xs) else (math.nan, math.nan)


def power_law(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """(a, b) of y = a x^-b, by least squares on the logarithms; exact for two points."""
    slope, intercept = statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys])
    return math.exp(intercept), -slope
