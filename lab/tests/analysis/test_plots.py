"""Plots hold every layer and checkpoint, with labelled axes, on white."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lab.analysis import Analysis
from lab.analysis.plots import FILES, heat_map, scatter, spread, write_plots
from lab.analysis.report import CheckpointChange, RunChange
from lab.tests.analysis.test_report import checkpoint


def analysis_of(*runs: RunChange) -> Analysis:
    return Analysis("base", "output", ("*",), runs)


@pytest.fixture
def analysis() -> Analysis:
    first = RunChange("first", [checkpoint(10, 1.0), checkpoint(20, 1.5, seed=1)])
    whole = checkpoint(None, -1.0)
    part = CheckpointChange(None, "LoRA", whole.layers[:6])
    return analysis_of(first, RunChange("second", [part]))


def test_a_panel_for_each_run_with_its_points_and_lines(analysis: Analysis) -> None:
    figure = scatter(analysis)
    assert "norm" in figure.get_supxlabel()
    assert "output channel" in figure.get_supxlabel()
    assert "cosine" in figure.get_supylabel()
    for panel, run in zip(figure.axes, analysis.runs, strict=True):
        assert panel.get_title().startswith(f"{run.name} ({run.method})\nr = ")
        assert [text.get_text() for text in panel.get_legend().get_texts()] == [
            c.label for c in run.checkpoints
        ]
        drawn = zip(panel.collections, panel.lines, run.checkpoints, strict=True)
        for points, line, change in drawn:
            x, y = np.transpose(points.get_offsets())
            np.testing.assert_array_equal(x, [layer.delta_m for layer in change.layers])
            np.testing.assert_array_equal(y, [layer.delta_d for layer in change.layers])
            # The least-squares line goes through the means, with this slope.
            (x0, x1), (y0, y1) = line.get_data()
            slope = np.cov(x, y)[0, 1] / np.var(x, ddof=1)
            assert (y1 - y0) / (x1 - x0) == pytest.approx(slope)
            assert y0 + slope * (x.mean() - x0) == pytest.approx(y.mean())


def test_the_heat_map_has_a_cell_for_each_layer_and_checkpoint(analysis: Analysis) -> None:
    figure = heat_map(analysis)
    left, right = figure.axes[:2]
    names = [text.get_text() for text in left.get_yticklabels()]
    assert names == [layer.name for layer in analysis.runs[0].checkpoints[0].layers]
    assert [text.get_text() for text in left.get_xticklabels()] == ["10", "20", "second"]
    assert left.get_xlabel() == "optimizer step; grey: not changed"
    for panel, figure_name in ((left, "relative_delta_m"), (right, "delta_d")):
        grid = panel.images[0].get_array()
        assert grid.shape == (12, 3)
        for column, change in enumerate(c for run in analysis.runs for c in run.checkpoints):
            expected = [getattr(layer, figure_name) for layer in change.layers]
            np.testing.assert_array_equal(grid[: len(expected), column], expected)
        assert grid.mask.sum() == 6
        assert grid.mask[6:, 2].all()


def test_of_many_layers_the_parts_of_the_model_are_named() -> None:
    layers = [
        dataclasses.replace(layer, name=layer.name.replace("resnets.", f"resnets.{seed}"))
        for seed in range(4)
        for layer in checkpoint(1, 1.0, seed).layers
    ]
    figure = heat_map(analysis_of(RunChange("run", [CheckpointChange(1, "DoRA", layers)])))
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["UNet down (24)", "UNet up (24)"]


def test_a_single_layer_is_drawn_too(tmp_path: Path) -> None:
    one = CheckpointChange(None, "LoRA", checkpoint(1, 1.0).layers[:1])
    files = write_plots(analysis_of(RunChange("one", [one])), tmp_path)
    assert all(path.stat().st_size > 5000 for path in files.values())


def test_of_many_checkpoints_some_are_drawn_and_the_title_says_so() -> None:
    checkpoints = [checkpoint(step, 1.0) for step in range(20)]
    assert [c.step for c in spread(checkpoints, 8)] == [0, 3, 5, 8, 11, 14, 16, 19]
    (panel,) = scatter(analysis_of(RunChange("run", checkpoints))).axes
    assert len(panel.collections) == 8
    assert panel.get_title().endswith(", 8 of 20 checkpoints drawn")


def test_files_are_images_on_white(analysis: Analysis, tmp_path: Path) -> None:
    files = write_plots(analysis, tmp_path)
    assert {path.name for path in files.values()} == set(FILES.values())
    for path in files.values():
        with Image.open(path) as image:
            assert image.format == "PNG"
            pixels = np.asarray(image.convert("RGBA"))
        assert (pixels[..., 3] == 255).all()
        assert (pixels[0, 0] == 255).all()
        assert (pixels == 255).all(-1).mean() > 0.2


def test_a_name_that_no_font_has_is_no_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    run = RunChange("run 🐕 犬", [checkpoint(1, 1.0)])
    write_plots(analysis_of(run), tmp_path)
    assert [each.message for each in recwarn if "Glyph" in str(each.message)] == []
