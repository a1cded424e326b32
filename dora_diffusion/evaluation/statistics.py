"""Confidence intervals of means, shares and correlations, and of runs that share a subject."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% confidence interval.

    Attributes:
        mean: The estimate.
        low: Lower end; None where one value gives no interval.
        high: Upper end; None where one value gives no interval.
        n: How many values it is from: images or runs.
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
        ValueError: Fewer than one degree of freedom, or a probability outside of 0.5 to 1.
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
    """P(T <= t) for t >= 0, by the finite sums for whole degrees (Abramowitz, Stegun 26.7.3-4)."""
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
    """The mean of independent values, with Student's t interval.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("no values to average")
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return Interval(mean, None, None, 1, "t")
    half = t_quantile(n - 1, (1 + LEVEL) / 2) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n, "t")


def wilson_interval(right: float, n: int) -> Interval:
    """A share of n independent trials, with Wilson's score interval (1927).

    It is honest at 0 and 1, where the spread of what was seen says nothing.

    Raises:
        ValueError: There is no trial, or more are right than there are.
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

    It takes the shares as independent. Those of one set of prompts and seeds are not, but mostly go
    together, which makes this interval wider than it had to be.

    Raises:
        ValueError: One of them is not an interval.
    """
    if share.low is None or share.high is None or base.low is None or base.high is None:
        raise ValueError("two intervals are needed")
    mean = share.mean - base.mean
    below = math.hypot(share.mean - share.low, base.high - base.mean)
    above = math.hypot(share.high - share.mean, base.mean - base.low)
    return Interval(mean, mean - below, mean + above, share.n, "newcombe")


def cluster_interval(
    groups: Mapping[str, Sequence[float]], *, draws: int = 10_000, seed: int = 0
) -> Interval:
    """The mean over groups of their means, with a bootstrap interval over both levels.

    Each draw takes as many groups as there are, with replacement, and from each as many of its
    values: runs on one subject resemble each other, so that they are not independent values.

    Args:
        groups: Values by group, such as a score per seed by subject.
        draws: Bootstrap draws.
        seed: Of the draws.

    Raises:
        ValueError: There is no group, or one is empty.
    """
    values = [np.asarray(group, float) for group in groups.values()]
    if not values or any(not len(group) for group in values):
        raise ValueError("every group needs a value")
    mean, n = float(np.mean([group.mean() for group in values])), sum(map(len, values))
    if n == 1:
        return Interval(mean, None, None, 1, "bootstrap")
    generator = np.random.default_rng(seed)
    # Means of resampled values, for every group and draw; then groups are resampled among them.
    inner = np.stack(
        [g[generator.integers(len(g), size=(draws, len(values), len(g)))].mean(-1) for g in values]
    )
    chosen = generator.integers(len(values), size=(draws, len(values)))
    rows, slots = np.arange(draws)[:, None], np.arange(len(values))[None]
    means = inner[chosen, rows, slots].mean(1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(mean, float(low), float(high), n, "bootstrap")


def correlation_interval(
    groups: Mapping[str, Sequence[tuple[float, float]]], *, draws: int = 10_000, seed: int = 0
) -> Interval | None:
    """Pearson's correlation over the pairs of all groups, with a bootstrap interval over groups.

    Each draw takes as many groups as there are, with replacement, and all pairs of each: pairs of
    one group resemble each other, and Fisher's interval, which takes every pair for one more
    observation, would be too narrow. With few groups this one is too narrow still.

    Args:
        groups: Pairs by group, such as the layers of one block at all checkpoints.
        draws: Bootstrap draws.
        seed: Of the draws.

    Returns:
        None where there is no correlation: fewer than three pairs, or values that are all the
        same. The interval has no ends where there are fewer than three groups.
    """
    pairs = [np.asarray(group, float) for group in groups.values() if len(group)]
    n = sum(map(len, pairs))
    if n < 3:
        return None
    every = np.concatenate(pairs)
    spread = every.std(0)
    if not (spread > 0).all():
        return None
    # Of numbers around 0, sums over a draw's groups give its correlation without cancellation.
    x, y = np.transpose((every - every.mean(0)) / spread)
    terms = np.stack([np.ones(n), x, y, x * x, y * y, x * y], axis=1)
    sums = np.add.reduceat(terms, np.cumsum([0, *map(len, pairs[:-1])]))
    estimate = float(np.clip(np.mean(x * y), -1, 1))
    if len(pairs) < 3:
        return Interval(estimate, None, None, n, "bootstrap")
    generator = np.random.default_rng(seed)
    shares = np.full(len(pairs), 1 / len(pairs))
    times = generator.multinomial(len(pairs), shares, size=draws)
    count, sx, sy, sxx, syy, sxy = np.moveaxis(times @ sums, 1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (sxy - sx * sy / count) / np.sqrt((sxx - sx * sx / count) * (syy - sy * sy / count))
    # A draw of one group's single pair, over and over, has none.
    ends = np.nanquantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    low, high = np.clip(ends, -1, 1)
    return Interval(estimate, float(low), float(high), n, "bootstrap")
