"""Where in an image an object is, and how large, seen in the toy world's grey studio.

The studio is grey and the shadow too, so that what has a colour is the object. No network is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STUDIO = "studio"
_COLORFUL = 0.12
_LEAST = 0.01


@dataclass(frozen=True)
class Silhouette:
    """Centre of the object's box from -1 (left) to 1 (right), and the root of its area's share."""

    center: float
    size: float


def silhouette(pixels: Tensor) -> Silhouette | None:
    """Find the object in a studio image ``(3, h, w)`` in [0, 1]; None if nothing has a colour."""
    mask = (pixels.amax(0) - pixels.amin(0)) > _COLORFUL
    share = float(mask.float().mean())
    if share < _LEAST:
        return None
    columns = torch.linspace(-1, 1, mask.shape[1]).expand_as(mask)[mask]
    # Not the extremes: a stray pixel would move them.
    edges = torch.quantile(columns, torch.tensor([0.03, 0.97]))
    return Silhouette(float(edges.mean()), share**0.5)


SIDES, SIZES = ("left", "right"), ("small", "large")


def follows(pose: str, shape: Silhouette | None, middle: float) -> bool:
    """Whether an object is where, or as large as, a word says.

    Args:
        pose: A word of `SIDES` or `SIZES`.
        shape: What was found.
        middle: The size between small and large.
    """
    if shape is None:
        return False
    return {
        "left": shape.center < 0,
        "right": shape.center > 0,
        "small": shape.size < middle,
        "large": shape.size > middle,
    }[pose]


def middle_size(shapes: Mapping[str, Sequence[Silhouette | None]]) -> float | None:
    """The size half way between true small and true large images; None if none was seen."""
    measured = [[shape.size for shape in shapes[word] if shape is not None] for word in SIZES]
    return sum(sum(sizes) / len(sizes) for sizes in measured) / 2 if all(measured) else None
