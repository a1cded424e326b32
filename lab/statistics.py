"""Bootstrap confidence intervals of means and correlations of clustered values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dora_diffusion.evaluation.statistics import LEVEL, Interval


def cluster_interval(
    groups: Mapping[str, Sequence[float]], *, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of the groups' means, with a bootstrap interval over both levels.

    Each draw resamples the groups with replacement, then the values of each group: runs on one
    subject resemble each other and are not independent.

    Args:
        groups: Values by group, such as the scores of all seeds by subject.
        draws: Number of bootstrap draws.
        seed: Seed of the draws.

    Raises:
        ValueError: If there are no groups, or one is empty.
    """
    values = [np.asarray(group, float) for group in groups.values()]
    if not values or any(not len(group) for group in values):
        raise ValueError("every group needs a value")
    mean, n = float(np.mean([group.mean() for group in values])), sum(map(len, values))
    if n == 1:
        return Interval(mean, None, None, 1, "bootstrap")
    generator = np.random.default_rng(seed)
    # Means of resampled values for each group and draw; groups are resampled below.
    inner = np.stack(
        [g[generator.integers(len(g), size=(draws, len(values), len(g)))].mean(-1) for g in values]
    )
    drawn_groups = generator.integers(len(values), size=(draws, len(values)))
    rows, slots = np.arange(draws)[:, None], np.arange(len(values))[None]
    means = inner[drawn_groups, rows, slots].mean(1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(mean, float(low), float(high), n, "bootstrap")


def correlation_interval(
    groups: Mapping[str, Sequence[tuple[float, float]]], *, draws: int = 10_000, seed: int = 0
) -> Interval | None:
    """Pearson's correlation over the pairs of all groups, with a bootstrap interval over groups.

    Each draw resamples the groups with replacement and uses all their pairs: pairs of one group
    resemble each other, so Fisher's interval, which assumes independent pairs, would be too narrow.
    With few groups, this interval is also too narrow.

    Args:
        groups: Pairs by group, such as the layers of one block at all checkpoints.
        draws: Number of bootstrap draws.
        seed: Seed of the draws.

    Returns:
        None without a correlation: fewer than three pairs, or constant values. With fewer than
        three groups, the interval has no ends.
    """
    pairs = [np.asarray(group, float) for group in groups.values() if len(group)]
    n = sum(map(len, pairs))
    if n < 3:
        return None
    all_pairs = np.concatenate(pairs)
    spread = all_pairs.std(0)
    if not (spread > 0).all():
        return None
    # With standardized values, sums over groups give the correlation without cancellation.
    x, y = np.transpose((all_pairs - all_pairs.mean(0)) / spread)
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
    # A draw that repeats a single pair has no correlation (NaN).
    ends = np.nanquantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    low, high = np.clip(ends, -1, 1)
    return Interval(estimate, float(low), float(high), n, "bootstrap")
