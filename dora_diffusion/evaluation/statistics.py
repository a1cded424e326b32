"""Confidence intervals of means and shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% confidence interval.

    Attributes:
        mean: The estimate.
        low: Lower end; None if there are too few values.
        high: Upper end; None if there are too few values.
        n: Number of values: images or runs.
        method: ``"t"``, ``"wilson"``, ``"newcombe"`` or ``"bootstrap"``.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    method: str


def t_quantile(degrees: int, probability: float) -> float:
    """Quantile of Student's t distribution, by bisection.

    Raises:
        ValueError: If there is no degree of freedom, or the probability is not in [0.5, 1).
    """
    if degrees < 1 or not 0.5 <= probability < 1:
        raise ValueError(f"no t quantile of {degrees} degrees of freedom at {probability}")
    low, high = 0.0, 1.0
    while _t_below(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, degrees) < probability else (low, middle)
    return high


def _t_below(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0, by finite sums for integer degrees (Abramowitz, Stegun 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cos, sin = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term, total = (cos if odd else 1.0), 0.0
    for k in range(odd + 1, degrees, 2):
        total += term
        term *= k / (k + 1) * cos**2
    within = 2 / math.pi * (angle + sin * total) if odd else sin * total
    return 0.5 + 0.5 * within


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values, with Student's t interval.

    Raises:
        ValueError: If there are no values.
    """
    if not values:
        raise ValueError("no values to average")
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return Interval(mean, None, None, 1, "t")
    half = t_quantile(n - 1, (1 + LEVEL) / 2) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n, "t")


def wilson_interval(right: float, n: int) -> Interval:
    """Share of n independent trials, with Wilson's score interval (1927).

    The interval is also valid at shares of 0 and 1, where the sample variance is 0.

    Raises:
        ValueError: If there are no trials, or ``right`` is not between 0 and ``n``.
    """
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"{right} of {n} is not a share")
    z = 1.959963984540054
    share = right / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Interval(share, min(low, share), max(high, share), n, "wilson")


def share_difference(share: Interval, base: Interval) -> Interval:
    """Difference of two shares, with Newcombe's interval (1998, method 10) from Wilson's.

    The method assumes independent shares. Shares on the same prompts and seeds are usually
    positively correlated, which makes this interval wider than necessary.

    Raises:
        ValueError: If one of them has no interval.
    """
    if share.low is None or share.high is None or base.low is None or base.high is None:
        raise ValueError("two intervals are needed")
    mean = share.mean - base.mean
    below = math.hypot(share.mean - share.low, base.high - base.mean)
    above = math.hypot(share.high - share.mean, base.mean - base.low)
    return Interval(mean, mean - below, mean + above, share.n, "newcombe")
