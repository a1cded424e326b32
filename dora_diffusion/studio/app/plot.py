"""The loss of a run as a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_diffusion.studio.app.html import empty

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 12, 14, 28
_MOST_POINTS = 400


def smoothed(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential moving average without the bias of its start (as Adam corrects it)."""
    mean, result = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = keep * mean + (1 - keep) * value
        result.append(mean / (1 - keep**count))
    return result


def loss_plot(
    records: Sequence[Mapping[str, Any]], validation: Mapping[int, float] | None = None
) -> str:
    """Raw and smoothed loss over steps, and below them the validation loss on a scale of its own.

    Args:
        records: Of the steps.
        validation: Validation losses by step, 0 being the base; few, and of another size than
            training's, which weighs timesteps.
    """
    if len(records) < 2:
        return empty("No loss yet", "The curve appears with the first steps.")
    steps = [int(record["step"]) for record in records]
    raw = [float(record["loss"]) for record in records]
    smooth = smoothed(raw)
    every = -(-len(steps) // _MOST_POINTS)
    ordered = sorted(raw)
    # A few high draws (large noise levels) would flatten the rest.
    most = max(ordered[int(0.98 * (len(ordered) - 1))], max(smooth))
    area = _Area(steps[0], steps[-1], ordered[0], most)
    lines = area.line(steps[::every], raw[::every], "dd-raw")
    lines += area.line(steps[::every], smooth[::every], "dd-smooth")
    training = area.figure(
        f"Loss over {len(steps)} steps",
        lines,
        "<i class='dd-raw'></i>loss of each step <i class='dd-smooth'></i>smoothed: "
        f"<b>{smooth[-1]:.4f}</b>",
    )
    held_out = _validation_plot(steps, validation) if validation else ""
    return f"<div class='dd-plots'>{training}{held_out}</div>"


def _validation_plot(steps: Sequence[int], losses: Mapping[int, float]) -> str:
    """The validation loss over the same steps, with a mark at its lowest."""
    values, first = list(losses.values()), min(steps[0], *losses)
    best = min((step for step in losses if step), key=lambda step: losses[step], default=0)
    area = _Area(first, max(steps[-1], *losses), min(values), max(values))
    x, y = area.point(best, losses[best])
    lines = area.line(list(losses), values, "dd-smooth")
    lines += f"<circle class='dd-best' cx='{x:.1f}' cy='{y:.1f}' r='4'/>"
    base = f", the base's is {losses[0]:.4f}" if 0 in losses else ""
    return area.figure(
        f"Validation loss, taken {len(values)} times",
        lines,
        "<i class='dd-smooth'></i>validation loss on held-out photos: lowest at step "
        f"{best}: <b>{losses[best]:.4f}</b>{base}",
    )


@dataclass(frozen=True)
class _Area:
    """Area of a plot: its steps, and the losses from its bottom to its top."""

    first: int
    last: int
    low: float
    high: float

    def point(self, step: int, loss: float) -> tuple[float, float]:
        share = min(1.0, max(0.0, (loss - self.low) / ((self.high - self.low) or 1.0)))
        way = (step - self.first) / max(1, self.last - self.first)
        x = _LEFT + way * (_WIDTH - _LEFT - _RIGHT)
        return x, _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)

    def line(self, steps: Sequence[int], values: Sequence[float], name: str) -> str:
        places = (self.point(*at) for at in zip(steps, values, strict=True))
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return f"<polyline class='{name}' points='{points}'/>"

    def figure(self, label: str, lines: str, caption: str) -> str:
        axes = _axes(self.low, self.high, (self.first, self.last))
        return (
            f"<figure class='dd-plot'><svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' "
            f"aria-label='{label}'>{axes}{lines}</svg><figcaption>{caption}</figcaption></figure>"
        )


def _axes(low: float, high: float, steps: Sequence[int]) -> str:
    parts = []
    for share in (0.0, 0.5, 1.0) if high > low else (0.0,):
        y = _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)
        value = low + share * (high - low)
        parts.append(f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.0f}' y2='{y:.0f}'/>")
        parts.append(f"<text x='{_LEFT - 8}' y='{y + 4:.0f}' text-anchor='end'>{value:.3f}</text>")
    bottom = _HEIGHT - 8
    parts.append(f"<text x='{_LEFT}' y='{bottom}'>step {steps[0]}</text>")
    parts.append(
        f"<text x='{_WIDTH - _RIGHT}' y='{bottom}' text-anchor='end'>step {steps[-1]}</text>"
    )
    return "".join(parts)
