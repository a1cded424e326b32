"""Loss curves of a run, as data of Gradio's line plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dora_diffusion.studio.app.html import empty, pieces

RAW, SMOOTHED = "each step", "smoothed"
_MOST_POINTS = 400


def smoothed(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Return the exponential moving average with bias correction, as in Adam."""
    mean, result = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = keep * mean + (1 - keep) * value
        result.append(mean / (1 - keep**count))
    return result


def loss_text(
    run: str, records: Sequence[Mapping[str, Any]], validation: Mapping[int, float]
) -> str:
    """Return the last smoothed loss and the lowest validation loss of a run.

    The text differs between runs and after each step, so that the page redraws the plots.
    """
    if len(records) < 2:
        return empty("No loss yet", "The curve appears with the first steps.")
    loss = smoothed([float(record["loss"]) for record in records])[-1]
    best = min((step for step in validation if step), key=validation.__getitem__, default=0)
    return pieces.losses(f"{run}-{len(records)}", loss, validation, best)


def training_curves(records: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, str]]:
    """Return the raw and smoothed loss over steps, as rows of step, loss and curve."""
    raw = [float(record["loss"]) for record in records]
    if len(raw) < 2:
        return []
    ordered, smooth = sorted(raw), smoothed(raw)
    # A few outliers (large noise levels) would flatten the rest.
    most = max(ordered[int(0.98 * (len(ordered) - 1))], max(smooth))
    every = slice(None, None, -(-len(raw) // _MOST_POINTS))
    steps = [int(record["step"]) for record in records]
    return [
        (step, min(loss, most), name)
        for name, losses in ((RAW, raw), (SMOOTHED, smooth))
        for step, loss in zip(steps[every], losses[every], strict=True)
    ]


def plot_data(rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return rows of step, loss and curve in the format of `gradio.LinePlot`."""
    types = {"step": "quantitative", "loss": "quantitative", "curve": "nominal"}
    return {"columns": [*types], "data": [*map(list, rows)], "datatypes": types, "mark": "line"}
