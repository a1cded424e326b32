"""Intervals against published tables, published examples and plain simulation."""

from __future__ import annotations

import numpy as np
import pytest

from dora_diffusion.evaluation.statistics import (
    Interval,
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
