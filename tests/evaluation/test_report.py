"""An evaluation as a table, as JSON and as a sheet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.evaluation.report import Evaluation, shown
from dora_diffusion.evaluation.statistics import Interval


@pytest.mark.parametrize(
    ("interval", "is_share", "signed", "text"),
    [
        (None, False, False, "-"),
        (Interval(0.834, 0.8, 0.87, 9, "t"), False, False, "0.83 [0.80, 0.87]"),
        (Interval(0.95, 0.834, 0.99, 9, "wilson"), True, False, "95% [83, 99]"),
        (Interval(-0.05, -0.2, 0.1, 9, "newcombe"), True, True, "-5 [-20, +10]"),
        (Interval(0.0123, 0.01, 0.02, 9, "t"), False, True, "+0.0123 [+0.0100, +0.0200]"),
        (Interval(0.5, None, None, 1, "t"), False, False, "0.50"),
    ],
)
def test_figures_are_shown_with_their_intervals(interval, is_share, signed, text) -> None:
    assert shown(interval, is_share, signed=signed) == text


@pytest.fixture
def evaluation() -> Evaluation:
    columns = {
        "base": {"background": ((1, 0), (1, 1)), "denoising_loss": ((0.3, 0.2), (0.4, 0.3))},
        "adapted": {"background": ((1, 1), (1, 1)), "denoising_loss": ((0.2, 0.1), (0.3, 0.2))},
        "truth": {"background": ((1, 1), (1, 1))},
    }
    images = {name: [Image.new("RGB", (8, 8), name)] * 3 for name in ("red", "blue")}
    return Evaluation(
        "mug", columns, (0, 1), images, ["a", "b", "c"], ("likeness: no model",), {"base": "x"}
    )


def test_the_json_says_everything(evaluation: Evaluation, tmp_path: Path) -> None:
    files = evaluation.write(tmp_path)
    report = json.loads(files["scores"].read_text(encoding="utf-8"))
    assert (report["schema"], report["subject"], report["base"]) == (2, "mug", "x")
    assert report["seeds"] == [0, 1]
    background = report["measures"]["background"]
    assert background["kind"] == "share"
    assert background["base"]["mean"] == 0.75
    assert background["change"]["mean"] == 0.25
    assert background["per_seed"] == {"base": [0.5, 1], "adapted": [1, 1], "truth": [1, 1]}
    loss = report["measures"]["denoising_loss"]
    assert loss["change"]["mean"] == pytest.approx(-0.1)
    assert loss["truth"] is None
    for interval in (background["adapted"], loss["change"]):
        assert interval.keys() == {"mean", "low", "high", "n", "method"}
    assert report["notes"] == ["likeness: no model"]
    table = files["table"].read_text(encoding="utf-8")
    assert "| background as asked" in table
    assert "not measured: likeness" in table
    with Image.open(files["images"]) as image:
        assert image.width > 3 * 112
