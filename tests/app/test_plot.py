"""The loss plot."""

from __future__ import annotations

import math

import pytest

from dora_diffusion.app.plot import loss_plot, smoothed


def test_smoothing_starts_without_bias() -> None:
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    first, second = smoothed([1.0, 0.0], keep=0.5)
    assert (first, second) == pytest.approx((1.0, 1 / 3))


def test_the_plot_says_when_there_is_nothing() -> None:
    assert "No loss yet" in loss_plot([{"step": 1, "loss": 0.5}])


def test_the_plot_has_a_bounded_size_and_finite_points() -> None:
    records = [{"step": i, "loss": math.sin(i) ** 2} for i in range(1, 20_000)]
    drawn = loss_plot(records)
    assert len(drawn) < 30_000
    assert "nan" not in drawn
    assert "nan" not in loss_plot([{"step": i, "loss": 0.25} for i in range(1, 4)])
