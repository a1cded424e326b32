"""Bootstrap intervals, against plain simulation."""

from __future__ import annotations

import numpy as np
import pytest

from dora_diffusion.evaluation.statistics import Interval
from lab.statistics import cluster_interval, correlation_interval


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
