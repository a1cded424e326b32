"""Intervals against published tables, published examples and plain simulation."""

from __future__ import annotations

import numpy as np
import pytest

from dora_diffusion.evaluation.statistics import (
    Interval,
    cluster_interval,
    correlation_interval,
    share_difference,
    t_interval,
    t_quantile,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (8, 2.306), (30, 2.042)],
)
def test_t_quantiles_are_those_of_the_printed_table(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees, 0.975) == pytest.approx(quantile, abs=5e-4)
    assert t_quantile(degrees, 0.5) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="0 degrees"):
        t_quantile(0, 0.975)


def test_the_t_interval_covers_the_mean_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        one = t_interval(generator.normal(3, 2, 4).tolist())
        assert one.low is not None
        assert one.high is not None
        hits += one.low <= 3 <= one.high
    assert 0.94 <= hits / 2000 <= 0.96


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert t_interval([0.5]) == Interval(0.5, None, None, 1, "t")
    with pytest.raises(ValueError, match="no values"):
        t_interval([])


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I.
    [
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718),
    ],
)  # fmt: skip
def test_wilson_is_as_published(right: int, n: int, low: float, high: float) -> None:
    one = wilson_interval(right, n)
    assert (one.mean, one.n) == (right / n, n)
    assert one.low == pytest.approx(low, abs=5e-5)
    assert one.high == pytest.approx(high, abs=5e-5)
    mirrored = wilson_interval(n - right, n)
    assert mirrored.high == pytest.approx(1 - low, abs=5e-5)


def test_shares_must_be_shares() -> None:
    with pytest.raises(ValueError, match="5 of 4"):
        wilson_interval(5, 4)


def test_the_difference_of_shares_is_as_published() -> None:
    # Newcombe (1998), "Interval estimation for the difference", table II, method 10: (a) 56/70 -
    # 48/80 and (b) 9/10 - 3/10.
    one = share_difference(wilson_interval(56, 70), wilson_interval(48, 80))
    assert (one.mean, one.low, one.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    two = share_difference(wilson_interval(9, 10), wilson_interval(3, 10))
    assert (two.mean, two.low, two.high) == pytest.approx((0.6, 0.1705, 0.8090), abs=5e-5)


def test_the_bootstrap_resamples_groups_and_then_their_values() -> None:
    groups = {"a": [0.1, 0.2, 0.6], "b": [0.9, 1.0], "c": [0.3, 0.3, 0.4, 0.5]}
    one = cluster_interval(groups)
    generator = np.random.default_rng(1)
    names, means = list(groups), []
    for _ in range(10_000):
        drawn = [groups[names[i]] for i in generator.integers(3, size=3)]
        means.append(np.mean([np.mean(generator.choice(g, len(g))) for g in drawn]))
    assert one.mean == pytest.approx(np.mean([np.mean(g) for g in groups.values()]))
    assert one.low == pytest.approx(np.quantile(means, 0.025), abs=0.02)
    assert one.high == pytest.approx(np.quantile(means, 0.975), abs=0.02)
    assert one.n == 9
    assert cluster_interval(groups) == one
    with pytest.raises(ValueError, match="every group"):
        cluster_interval({"a": []})


def test_the_correlation_is_pearson_s_and_its_interval_that_of_a_plain_bootstrap() -> None:
    generator = np.random.default_rng(3)
    groups = {}
    for name in "abcdefgh":
        points = generator.normal(size=(generator.integers(1, 6), 1)) + generator.normal()
        groups[name] = np.hstack([points, 5 - 2 * points + generator.normal(size=points.shape)])
    found = correlation_interval({name: group.tolist() for name, group in groups.items()})
    every = np.concatenate(list(groups.values()))
    assert found is not None
    assert found.mean == pytest.approx(np.corrcoef(every.T)[0, 1], abs=1e-12)
    assert (found.n, found.method) == (len(every), "bootstrap")
    drawn = []
    for _ in range(10_000):
        chosen = generator.choice(list(groups), size=len(groups))
        drawn.append(np.corrcoef(np.concatenate([groups[name] for name in chosen]).T)[0, 1])
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.01)
    # The unit of neither matters, nor how far it is from 0.
    moved = {name: (group * [1e-9, 1] + [1, 1e6]).tolist() for name, group in groups.items()}
    again = correlation_interval(moved)
    assert again is not None
    assert (again.mean, again.low) == pytest.approx((found.mean, found.low), abs=1e-6)


def test_where_there_is_no_correlation_there_is_none() -> None:
    assert correlation_interval({}) is None
    assert correlation_interval({"a": [(0, 1), (1, 2)], "b": []}) is None
    assert correlation_interval({"a": [(0, 1)], "b": [(1, 1)], "c": [(2, 1)]}) is None
    line = [(0, 1), (1, 3), (2, 5)]
    assert correlation_interval({"a": line[:1], "b": line[1:]}) == Interval(
        pytest.approx(1), None, None, 3, "bootstrap"
    )
    certain = correlation_interval({"a": line[:1], "b": line[1:2], "c": line[2:]})
    assert certain is not None
    assert (certain.low, certain.high) == pytest.approx((1, 1))
