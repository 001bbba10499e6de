"""What a few measurements allow to be said: Student's t for few degrees of freedom, intervals, paired differences."""
import math
import statistics
from dataclasses import dataclass

CONFIDENCE = 0.95


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) for Student's t with `df` degrees of freedom, a whole number: a sum of as many terms as df / 2. Source:
    Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(df))
    cosine = math.cos(angle)
    # cos θ + 2/3 cos³ θ + 2·4/(3·5) cos⁵ θ … for odd df, 1 + 1/2 cos² θ + 1·3/(2·4) cos⁴ θ … for even
    term, total, first = (cosine, 0.0, 2) if df % 2 else (1.0, 0.0, 1)
    for k in range(df // 2):
        total += term
        term *= (first + 2 * k) / (first + 2 * k + 1) * cosine**2
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if df % 2 else math.sin(angle) * total
    return 0.5 + inside / 2


def t_quantile(p: float, df: int) -> float:
    """The t below which a share p, above one half, of the distribution lies; by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return high


@dataclass(frozen=True)
class Estimate:
    """A mean, and how far from it the true one may be, with 95 % confidence; infinitely far where there is one value."""
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
    def of(cls, values: list[float]) -> "Estimate":
        """values: independent, about normal. Raises ValueError when there are none."""
        if not values:
            raise ValueError("nothing was measured")
        if len(values) == 1:
            return cls(values[0], math.inf, 1)
        n = len(values)
        error = statistics.stdev(values) / math.sqrt(n)
        return cls(statistics.mean(values), t_quantile(0.5 + CONFIDENCE / 2, n - 1) * error, n)


def p_value(values: list[float]) -> float:
    """Two-sided, of the mean being 0: how often as large a mean would come about by chance. 1 where it cannot be told."""
    if len(values) < 2:
        return 1.0
    mean, spread = statistics.mean(values), statistics.stdev(values)
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * (1 - t_cdf(abs(mean) / spread * math.sqrt(len(values)), len(values) - 1))


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for there being several: the chance that any one of the comparisons would look as good by accident.
    Source: Holm 1979, Scandinavian Journal of Statistics 6."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def power_law(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """(a, b) of y = a x^-b, by least squares of the logarithms; exact for two points."""
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    slope, start = statistics.linear_regression(log_x, log_y)
    return math.exp(start), -slope
