"""Is one method better than another? Paired differences over seeds, with Student's t interval.

Runs of one seed share initialisation, order and augmentation, so the difference of two methods is taken seed by seed:
what a lucky seed gives to both cancels. With d_i the differences of n seeds, mean m and standard deviation s,

    m  +-  t(1 - (1 - confidence) / 2, n - 1)  s / sqrt(n)

Student 1908. Where k methods are compared with one baseline, a verdict asks for the interval at confidence
1 - (1 - confidence) / k (Bonferroni), so that all k verdicts together are right as often as promised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan, cos, pi, sin, sqrt
from statistics import mean, stdev


def t_within(t: float, df: int) -> float:
    """P(|T| <= t) of Student's t with `df` degrees of freedom: Abramowitz and Stegun 26.7.3 and 26.7.4, exact."""
    angle = atan(t / sqrt(df))
    term = total = cos(angle) if df % 2 else 1.0
    for k in range(3 if df % 2 else 2, df - 1, 2):
        term *= (k - 1) / k * cos(angle) ** 2
        total += term
    if df % 2:
        return 2 / pi * (angle + (sin(angle) * total if df > 1 else 0.0))
    return sin(angle) * total


def t_quantile(confidence: float, df: int) -> float:
    """The t with P(|T| <= t) = confidence, by bisection. df >= 1, 0 < confidence < 1."""
    low, high = 0.0, 1.0
    while t_within(high, df) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, df) < confidence else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Difference:
    """mean of the paired differences and, where there are two seeds or more, their spread and interval."""

    values: tuple[float, ...]
    mean: float
    spread: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: float = 0.95

    @property
    def covers_zero(self) -> bool:
        """Whether no difference is one of the answers; a single seed rules nothing out."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95, resolution: float = 0.0) -> Difference:
    """a - b, seed by seed: two sequences over the same seeds in the same order.

    resolution: the smallest step of a value; a spread below it is taken as it, so that two seeds which happen to differ
    by the same do not pass for certainty.
    """
    values = tuple(x - y for x, y in zip(a, b, strict=True))
    if len(values) < 2:
        return Difference(values, mean(values), confidence=confidence)
    m, s = mean(values), stdev(values)
    half = t_quantile(confidence, len(values) - 1) * max(s, resolution) / sqrt(len(values))
    return Difference(values, m, s, m - half, m + half, confidence)
