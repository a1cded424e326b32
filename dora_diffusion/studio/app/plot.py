"""Loss curves of a run, drawn by pieces.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dora_diffusion.studio.app.html import empty, pieces

# Edges of the plot area in the drawing of 640 x 240 in pieces.html.
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 628, 14, 212
_MOST_POINTS = 400


def smoothed(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Return the exponential moving average with bias correction, as in Adam."""
    mean, result = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = keep * mean + (1 - keep) * value
        result.append(mean / (1 - keep**count))
    return result


def loss_plot(
    records: Sequence[Mapping[str, Any]], validation: Mapping[int, float] | None = None
) -> str:
    """Plot the raw and smoothed loss over steps, and below them the validation loss.

    Args:
        records: Records of the steps.
        validation: Validation losses by step; step 0 is the base model. They have a separate scale,
            because the training loss weights timesteps.
    """
    if len(records) < 2:
        return empty("No loss yet", "The curve appears with the first steps.")
    steps = [int(record["step"]) for record in records]
    raw = [float(record["loss"]) for record in records]
    smooth = smoothed(raw)
    every = -(-len(steps) // _MOST_POINTS)
    ordered = sorted(raw)
    # A few outliers (large noise levels) would flatten the rest.
    most = max(ordered[int(0.98 * (len(ordered) - 1))], max(smooth))
    training = _Area(f"Loss over {len(steps)} steps", steps[0], steps[-1], ordered[0], most)
    training.add_line("dd-raw", steps[::every], raw[::every])
    training.add_line("dd-smooth", steps[::every], smooth[::every])
    held_out = _validation_area(steps, validation) if validation else None
    return pieces.plots(training, smooth[-1], held_out)


def _validation_area(steps: Sequence[int], losses: Mapping[int, float]) -> _Area:
    """Return the plot of the validation loss over the same steps, with a mark at its minimum."""
    values, first = list(losses.values()), min(steps[0], *losses)
    label = f"Validation loss, taken {len(values)} times"
    area = _Area(label, first, max(steps[-1], *losses), min(values), max(values))
    area.add_line("dd-smooth", list(losses), values)
    area.best = min((step for step in losses if step), key=lambda step: losses[step], default=0)
    area.losses = losses
    return area


@dataclass
class _Area:
    """Area of a plot, with its range of steps and losses.

    Attributes:
        label: Label for screen readers.
        first: Step at the left edge.
        last: Step at the right edge.
        low: Loss at the bottom edge.
        high: Loss at the top edge.
        lines: CSS class -> points of a curve.
        best: Step of the lowest validation loss.
        losses: Validation losses by step.
    """

    label: str
    first: int
    last: int
    low: float
    high: float
    lines: dict[str, str] = field(default_factory=dict)
    best: int = 0
    losses: Mapping[int, float] = field(default_factory=dict)

    def point(self, step: int, loss: float) -> tuple[str, str]:
        """Return the coordinates of a loss in the drawing."""
        share = min(1.0, max(0.0, (loss - self.low) / ((self.high - self.low) or 1.0)))
        way = (step - self.first) / max(1, self.last - self.first)
        return f"{_LEFT + way * (_RIGHT - _LEFT):.1f}", f"{_BOTTOM - share * (_BOTTOM - _TOP):.1f}"

    def add_line(self, name: str, steps: Sequence[int], losses: Sequence[float]) -> None:
        """Add a curve with the CSS class ``name``."""
        points = (self.point(*at) for at in zip(steps, losses, strict=True))
        self.lines[name] = " ".join(f"{x},{y}" for x, y in points)

    @property
    def grid(self) -> list[tuple[int, str]]:
        """Heights of the grid lines with their losses; a single line if all losses are equal."""
        shares = (0.0, 0.5, 1.0) if self.high > self.low else (0.0,)
        return [
            (
                round(_BOTTOM - share * (_BOTTOM - _TOP)),
                f"{self.low + share * (self.high - self.low):.3f}",
            )
            for share in shares
        ]
