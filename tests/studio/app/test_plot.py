"""The loss curves."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")

from dora_diffusion.studio.app.views.run import (
    RAW,
    SMOOTHED,
    loss_text,
    plot_data,
    smoothed,
    training_curves,
)


def test_smoothing_starts_without_bias() -> None:
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    first, second = smoothed([1.0, 0.0], keep=0.5)
    assert (first, second) == pytest.approx((1.0, 1 / 3))


def test_the_text_says_when_there_is_nothing() -> None:
    records = [{"step": 1, "loss": 0.5}]
    assert "No loss yet" in loss_text("run", records, {})
    assert training_curves(records) == []


def test_the_curves_have_a_bounded_size_and_finite_points() -> None:
    records = [{"step": i, "loss": math.sin(i) ** 2} for i in range(1, 20_000)]
    rows = training_curves(records)
    assert len(json.dumps(plot_data(rows))) < 60_000
    assert {name for *_, name in rows} == {RAW, SMOOTHED}
    assert all(math.isfinite(loss) for _, loss, _ in rows)
    constant = training_curves([{"step": i, "loss": 0.25} for i in range(1, 4)])
    assert [(step, name) for step, _, name in constant] == [
        (step, name) for name in (RAW, SMOOTHED) for step in (1, 2, 3)
    ]
    assert [loss for _, loss, _ in constant] == pytest.approx([0.25] * 6)


def test_the_lowest_validation_loss_is_named_and_each_step_is_another_text() -> None:
    records = [{"step": i, "loss": 0.01} for i in range(1, 5)]
    text = loss_text("run", records, {0: 0.5, 2: 0.25, 4: 0.75})
    assert "lowest at step 2: <b>0.2500</b>, the base's is 0.5000" in text
    assert "Validation" not in loss_text("run", records, {})
    texts = {loss_text(run, records[:n], {}) for run in ("a", "b") for n in (2, 3, 4)}
    assert len(texts) == 6
