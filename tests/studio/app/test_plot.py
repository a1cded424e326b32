"""The loss plot."""

from __future__ import annotations

import math
import re

import pytest

from dora_diffusion.studio.app.plot import loss_plot, smoothed


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


def test_the_validation_loss_has_a_scale_of_its_own_and_a_mark_at_its_lowest() -> None:
    records = [{"step": i, "loss": 0.01} for i in range(1, 5)]
    assert loss_plot(records, {}) == loss_plot(records)
    _, drawn = loss_plot(records, {0: 0.5, 2: 0.25, 4: 0.75}).split("Validation loss, ")
    assert drawn.startswith("taken 3 times")
    line = re.search(r"points='([^']*)'", drawn)
    assert line is not None
    heights = [float(point.split(",")[1]) for point in line[1].split()]
    top, bottom = heights[2], heights[1]
    assert heights[0] == pytest.approx(bottom + (top - bottom) / 2), "from 0.25 to 0.75"
    assert f"cy='{bottom:.1f}'" in drawn
    assert "lowest at step 2: <b>0.2500</b>, the base's is 0.5000" in drawn


def test_one_loss_has_one_label() -> None:
    records = [{"step": i, "loss": float(i)} for i in range(1, 4)]
    training, held_out = loss_plot(records, {0: 0.5}).split("Validation loss, ")
    labels = [re.findall(r"text-anchor='end'>([\d.]+)<", part) for part in (training, held_out)]
    assert len(labels[0]) == 3
    assert labels[1] == ["0.500"]
