"""Plots of an analysis: direction over magnitude as in the paper, and layers by checkpoint.

Plots have a white background and black labels, also in dark mode and in print. Colours are from
viridis, whose order is visible to colour-blind readers and in grey; checkpoints also have different
markers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_diffusion.formats.files.atomic import atomic_file
from lab.analysis.report import (
    Analysis,
    CheckpointChange,
    RunChange,
    correlation,
    model_order,
    place_of,
    shown,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = {"scatter": "scatter.png", "heat map": "heat-map.png"}
DELTA = "\N{GREEK CAPITAL LETTER DELTA}"
MARKERS = "osD^vP*X"
PANELS_IN_A_ROW = 3
# Limit of layers that are labelled by name; more are labelled by part of the model.
_MOST_NAMES = 40


def write_plots(analysis: Analysis, folder: Path) -> dict[str, Path]:
    """Write the `FILES`; returns their paths."""
    drawn = {"scatter": scatter(analysis), "heat map": heat_map(analysis)}
    for name, figure in drawn.items():
        save_figure(figure, folder / FILES[name], dpi=160)
    return {name: folder / FILES[name] for name in drawn}


def scatter(analysis: Analysis) -> Figure:
    """Plot delta D over delta M: one panel per run, points are layers, lines are regressions.

    If a run has more checkpoints than there are markers, evenly spaced ones are plotted.
    """
    figure, panels = panel_grid(len(analysis.runs), (4.6, 4.1), (0.6, 0.3))
    for panel, run in zip(panels, analysis.runs, strict=True):
        _draw_run(panel, run)
    figure.supxlabel(
        f"{DELTA}M: mean change of norm per {analysis.norm_axis} channel (unit of the weights)",
        fontsize=10,
    )
    figure.supylabel(f"{DELTA}D: mean of 1 \N{MINUS SIGN} cosine", fontsize=10)
    return figure


def _draw_run(panel: Any, run: RunChange) -> None:
    checkpoints = spread(run.checkpoints, len(MARKERS))
    for index, checkpoint in enumerate(checkpoints):
        x, y = np.transpose([(layer.delta_m, layer.delta_d) for layer in checkpoint.layers])
        style = {"s": 16, "alpha": 0.6, "label": checkpoint.label}
        draw_changes(panel, x, y, index, len(checkpoints), linewidth=1.8, **style)
    omitted = len(run.checkpoints) - len(checkpoints)
    selection = (
        f", {len(checkpoints)} of {len(run.checkpoints)} checkpoints drawn" if omitted else ""
    )
    panel.set_title(
        f"{run.name} ({run.method})\nr = {shown(correlation(run.checkpoints))}{selection}",
        fontsize=9.5,
    )
    panel.ticklabel_format(scilimits=(-2, 3), useMathText=True)
    tidy(panel)
    panel.legend(fontsize=8, frameon=False)


def save_figure(figure: Figure, file: Path, *, dpi: int) -> None:
    """Write a figure as PNG, without warnings about glyphs that are missing from the font."""
    with atomic_file(file) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(temporary, format="png", dpi=dpi, facecolor="white")


def panel_grid(
    count: int,
    panel: tuple[float, float],
    frame: tuple[float, float] = (0, 0),
    most: int = PANELS_IN_A_ROW,
    **options: Any,
) -> tuple[Figure, list[Any]]:
    """Make a figure with ``count`` panels, at most ``most`` in a row.

    Sizes are in inches; ``frame`` is added around all panels. Options go to `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    columns = min(most, count)
    rows = -(-count // columns)
    size = (frame[0] + panel[0] * columns, frame[1] + panel[1] * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for unused in panels[count:]:
        unused.set_axis_off()
    return figure, panels[:count]


def draw_changes(
    panel: Any, x: Any, y: Any, index: int, count: int, *, linewidth: float, **style: Any
) -> None:
    """Plot the points of one of ``count`` checkpoints, with their regression line."""
    color = ordered_color(index, count)
    marker = MARKERS[index % len(MARKERS)]
    panel.scatter(x, y, color=color, marker=marker, linewidths=0, **style)
    if len(x) > 2 and np.ptp(x) > 0:
        slope, start = np.polyfit(x, y, 1)
        ends = np.array([x.min(), x.max()])
        panel.plot(ends, start + slope * ends, color=color, linewidth=linewidth)


def tidy(panel: Any) -> None:
    """Use small labels, no frame, and a grid behind the data."""
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)


def ordered_color(index: int, count: int) -> Any:
    """Return a colour from dark violet to green; yellow is too pale on white."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.8 * index / max(1, count - 1))


def spread(checkpoints: Sequence[CheckpointChange], most: int) -> list[CheckpointChange]:
    """Return at most ``most`` evenly spaced checkpoints, including the first and the last."""
    if len(checkpoints) <= most:
        return list(checkpoints)
    return [checkpoints[round(i * (len(checkpoints) - 1) / (most - 1))] for i in range(most)]


def heat_map(analysis: Analysis) -> Figure:
    """Plot the changes of every layer at every checkpoint, on a logarithmic colour scale."""
    checkpoints = [(run, c) for run in analysis.runs for c in run.checkpoints]
    names = sorted({x.name for _, c in checkpoints for x in c.layers}, key=model_order)
    height = min(8.5, max(3.6, 1.9 + 0.16 * len(names)))
    width = 3.2 + 0.5 * len(names[0]) / 10 + 2 * max(1.6, 0.34 * len(checkpoints))
    figure, panels = panel_grid(2, (min(width, 16) / 2, height), sharey=True)
    titles = {
        "relative_delta_m": f"{DELTA}M, share of the norm",
        "delta_d": f"{DELTA}D, 1 \N{MINUS SIGN} cosine",
    }
    for panel, (figure_name, title) in zip(panels, titles.items(), strict=True):
        values = [
            {layer.name: getattr(layer, figure_name) for layer in c.layers} for _, c in checkpoints
        ]
        grid = np.array([[column.get(name, 0.0) for column in values] for name in names])
        _draw_grid(figure, panel, grid, title)
        _label_columns(panel, analysis.runs, "; grey: not changed" if not grid.all() else "")
    _label_rows(panels, names)
    return figure


def _draw_grid(figure: Figure, panel: Any, grid: Any, title: str) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    shown_values = np.ma.masked_less_equal(grid, 0)
    low = shown_values.min() if shown_values.count() else 1e-3
    high = shown_values.max() if shown_values.count() else 1.0
    # Unchanged layers are grey.
    colors = colormaps["viridis"].with_extremes(bad="0.85")
    norm = LogNorm(low, max(high, 1.0001 * low))
    drawn = panel.imshow(
        shown_values, aspect="auto", cmap=colors, norm=norm, interpolation="nearest"
    )
    bar = figure.colorbar(drawn, ax=panel, shrink=0.85)
    bar.ax.tick_params(labelsize=8)
    panel.set_title(title, fontsize=9.5, pad=18)


def _label_columns(panel: Any, runs: Sequence[RunChange], note: str) -> None:
    """Label columns by step, with run names above; runs with one checkpoint only by name."""
    labels, start = [], 0
    for run in runs:
        has_steps = len(run.checkpoints) > 1
        steps = ["result" if c.step is None else str(c.step) for c in run.checkpoints]
        labels += steps if has_steps or len(runs) == 1 else [_short(run.name)]
        if start:
            panel.axvline(start - 0.5, color="white", linewidth=3)
        if has_steps and len(runs) > 1:
            panel.annotate(
                _short(run.name),
                (start + (len(steps) - 1) / 2, 1),
                (0, 4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
            )
        start += len(steps)
    panel.set_xticks(range(start), labels, rotation=90, fontsize=8)
    panel.set_xlabel(f"optimizer step{note}", fontsize=9)


def _short(name: str, limit: int = 16) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


def _label_rows(panels: Sequence[Any], names: Sequence[str]) -> None:
    """Label the rows by layer name or, for many layers, by part of the model."""
    ticks: dict[float, str] = dict(enumerate(names))
    if len(names) > _MOST_NAMES:
        ticks, start = {}, 0
        for model_part, members in groupby(names, place_of):
            count = len(list(members))
            ticks[start + (count - 1) / 2] = f"{model_part} ({count})"
            start += count
            for panel in panels if start < len(names) else ():
                panel.axhline(start - 0.5, color="white", linewidth=1.5)
        panels[0].set_ylabel("layers, in the order of the model", fontsize=9)
    panels[0].set_yticks(list(ticks), list(ticks.values()), fontsize=7.5)
    for panel in panels:
        panel.tick_params(axis="y", length=0)
