"""The loss curves."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio as gr

from dora_diffusion.studio.app.plot import (
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


def test_an_outlier_does_not_flatten_the_rest() -> None:
    records = [{"step": i, "loss": 1e6 if i == 99 else 0.5} for i in range(1, 100)]
    raw = [loss for _, loss, name in training_curves(records) if name == RAW]
    assert raw[:-1] == [0.5] * 98
    assert raw[-1] == pytest.approx(smoothed([0.5] * 98 + [1e6])[-1])


def test_the_lowest_validation_loss_is_named_and_each_step_is_another_text() -> None:
    records = [{"step": i, "loss": 0.01} for i in range(1, 5)]
    text = loss_text("run", records, {0: 0.5, 2: 0.25, 4: 0.75})
    assert "lowest at step 2: <b>0.2500</b>, the base's is 0.5000" in text
    assert "Validation" not in loss_text("run", records, {})
    texts = {loss_text(run, records[:n], {}) for run in ("a", "b") for n in (2, 3, 4)}
    assert len(texts) == 6


def test_the_data_are_those_of_gradio_s_own_conversion() -> None:
    pandas = pytest.importorskip("pandas")
    rows = [(1, 0.5, RAW), (2, 0.25, SMOOTHED)]
    frame = pandas.DataFrame(rows, columns=["step", "loss", "curve"])
    expected = gr.LinePlot(x="step", y="loss", render=False).postprocess(frame)
    assert expected.model_dump() == plot_data(rows)
