"""Signed distances of two-dimensional shapes: negative inside, in the units of ``x`` and ``y``.

Every function takes coordinate grids of one shape, ``y`` pointing up, and returns a grid of that
shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Grid = NDArray[np.float32]
Point = tuple[float, float]


def circle(x: Grid, y: Grid, center: Point, radius: float) -> Grid:
    """Exact distance to a circle."""
    return np.hypot(x - center[0], y - center[1]) - radius


def ellipse(x: Grid, y: Grid, center: Point, radii: Point) -> Grid:
    """First-order distance to an ellipse with half axes ``radii``; exact on the outline."""
    u, v = (x - center[0]) / radii[0], (y - center[1]) / radii[1]
    level = np.hypot(u, v)
    slope = np.hypot(u / radii[0], v / radii[1])
    return level * (level - 1) / np.maximum(slope, 1e-4)


def box(x: Grid, y: Grid, center: Point, half: Point, corner: float = 0.0) -> Grid:
    """Exact distance to an upright box of half sizes ``half`` with rounded corners."""
    u = np.abs(x - center[0]) - half[0] + corner
    v = np.abs(y - center[1]) - half[1] + corner
    outside = np.hypot(np.maximum(u, 0), np.maximum(v, 0))
    return outside + np.minimum(np.maximum(u, v), 0) - corner


def segment(x: Grid, y: Grid, start: Point, end: Point, radius: float) -> Grid:
    """Exact distance to a straight stroke of half width ``radius`` with round ends."""
    along = (end[0] - start[0], end[1] - start[1])
    length = along[0] ** 2 + along[1] ** 2
    t = np.clip(((x - start[0]) * along[0] + (y - start[1]) * along[1]) / length, 0, 1)
    return np.hypot(x - start[0] - t * along[0], y - start[1] - t * along[1]) - radius


def polygon(x: Grid, y: Grid, corners: Sequence[Point], rounding: float = 0.0) -> Grid:
    """Exact distance to a closed polygon (even-odd rule), grown by ``rounding``."""
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    for start, end in zip(corners, [*corners[1:], corners[0]], strict=True):
        nearest = np.minimum(nearest, segment(x, y, start, end, 0.0))
        if start[1] != end[1]:
            crossing = start[0] + (y - start[1]) * (end[0] - start[0]) / (end[1] - start[1])
            inside ^= ((start[1] > y) != (end[1] > y)) & (x < crossing)
    return np.where(inside, -nearest, nearest) - rounding


def ring(distance: Grid, half_width: float) -> Grid:
    """The outline of a shape, ``2 * half_width`` wide."""
    return np.abs(distance) - half_width


def union(*distances: Grid) -> Grid:
    """Points in any of the shapes."""
    return np.minimum.reduce(distances)


def intersection(*distances: Grid) -> Grid:
    """Points in all of the shapes."""
    return np.maximum.reduce(distances)


def star_points(inner: float = 0.45, outer: float = 1.0, arms: int = 5) -> list[Point]:
    """Corners of a star standing on two arms."""
    corners = []
    for k in range(2 * arms):
        radius = outer if k % 2 == 0 else inner
        angle = np.pi / 2 + np.pi * k / arms
        corners.append((float(radius * np.cos(angle)), float(radius * np.sin(angle))))
    return corners


def heart_points(count: int = 40) -> list[Point]:
    """Corners of a heart that fills the square from -1 to 1."""
    t = np.linspace(0, 2 * np.pi, count, endpoint=False)
    x = np.sin(t) ** 3
    y = (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 15
    return [(float(a), float(b)) for a, b in zip(x, y + 0.1, strict=True)]


BOLT: list[Point] = [
    (0.2, 1),
    (-0.6, -0.15),
    (-0.05, -0.15),
    (-0.25, -1),
    (0.6, 0.25),
    (0.05, 0.25),
]
CROSS: list[Point] = [
    (-0.3, 0.9), (0.3, 0.9), (0.3, 0.3), (0.9, 0.3), (0.9, -0.3), (0.3, -0.3),
    (0.3, -0.9), (-0.3, -0.9), (-0.3, -0.3), (-0.9, -0.3), (-0.9, 0.3), (-0.3, 0.3),
]  # fmt: skip


def emblem(x: Grid, y: Grid, kind: str) -> Grid:
    """Distance to a flat sign of about the size of the square from -1 to 1.

    Raises:
        ValueError: no such emblem.
    """
    if kind == "star":
        return polygon(x, y, star_points(0.45))
    if kind == "heart":
        return polygon(x, y, heart_points())
    if kind == "bolt":
        return polygon(x, y, BOLT)
    if kind == "cross":
        return polygon(x, y, CROSS)
    if kind == "ring":
        return ring(circle(x, y, (0, 0), 0.65), 0.25)
    if kind == "moon":
        return intersection(circle(x, y, (0, 0), 0.95), -circle(x, y, (0.45, 0.1), 0.75))
    raise ValueError(f"no emblem {kind!r}; there are {', '.join(EMBLEMS)}")


EMBLEMS = ("star", "heart", "bolt", "cross", "ring", "moon")
