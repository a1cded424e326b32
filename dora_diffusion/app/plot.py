"""The loss of a run as an SVG, drawn on the server: it follows the page's colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dora_diffusion.app.html import empty

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 28
_MOST_POINTS = 400


def smoothed(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential moving average without the bias of its start (as Adam corrects it)."""
    mean, result = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = keep * mean + (1 - keep) * value
        result.append(mean / (1 - keep**count))
    return result


def loss_plot(records: Sequence[Mapping[str, Any]]) -> str:
    """Raw and smoothed loss over steps."""
    if len(records) < 2:
        return empty("No loss yet", "The curve appears with the first steps.")
    steps = [int(record["step"]) for record in records]
    raw = [float(record["loss"]) for record in records]
    smooth = smoothed(raw)
    every = -(-len(steps) // _MOST_POINTS)
    ordered = sorted(raw)
    # A few high draws (large noise levels) would flatten the rest.
    low, high = ordered[0], max(ordered[int(0.98 * (len(ordered) - 1))], max(smooth))
    span = (high - low) or 1.0

    def point(step: int, value: float) -> str:
        x = _LEFT + (step - steps[0]) / max(1, steps[-1] - steps[0]) * (_WIDTH - _LEFT - _RIGHT)
        share = min(1.0, max(0.0, (value - low) / span))
        return f"{x:.1f},{_TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM):.1f}"

    def line(values: Sequence[float], name: str) -> str:
        kept = [*zip(steps[::every], values[::every], strict=True)]
        points = " ".join(point(step, value) for step, value in kept)
        return f"<polyline class='{name}' points='{points}'/>"

    return (
        f"<figure class='dd-plot'><svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' "
        f"aria-label='Loss over {len(steps)} steps'>{_axes(low, high, steps)}"
        f"{line(raw, 'dd-raw')}{line(smooth, 'dd-smooth')}</svg>"
        f"<figcaption><i class='dd-raw'></i>loss of each step <i class='dd-smooth'></i>smoothed: "
        f"<b>{smooth[-1]:.4f}</b></figcaption></figure>"
    )


def _axes(low: float, high: float, steps: Sequence[int]) -> str:
    parts = []
    for share in (0.0, 0.5, 1.0):
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
