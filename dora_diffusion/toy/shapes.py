"""Objects and emblems of the toy world, as signed distances defined in `world.yaml`.

An object stands at about y = -0.9 in the square from -1 to 1 and fills most of it. The embedded
models learn the names of classes in `CLASSES`. Classes in `UNSEEN_CLASSES` have a shape, but their
names are not in training captions, so they can be unknown subjects.

Distances are negative inside, in the units of ``x`` and ``y``. Every function takes coordinate
grids of one shape, ``y`` pointing up, and returns a grid of that shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

Grid = NDArray[np.float32]
RGB = tuple[float, float, float]
Point = Sequence[float]

WORLD: Mapping[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "world.yaml").read_text(encoding="utf-8")
)
"""All facts of the toy world."""


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


def star(x: Grid, y: Grid, inner: float, outer: float = 1.0, rounding: float = 0.0) -> Grid:
    """Distance to a star with five arms that stands on two of them."""
    angles = [np.pi / 2 + np.pi * k / 5 for k in range(10)]
    radii = [outer, inner] * 5
    corners = [
        (float(radius * np.cos(angle)), float(radius * np.sin(angle)))
        for radius, angle in zip(radii, angles, strict=True)
    ]
    return polygon(x, y, corners, rounding)


def heart(x: Grid, y: Grid, rounding: float = 0.0) -> Grid:
    """Distance to a heart with 40 corners that fills the square from -1 to 1."""
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    u = np.sin(t) ** 3
    v = (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 15
    corners = [(float(a), float(b)) for a, b in zip(u, v + 0.1, strict=True)]
    return polygon(x, y, corners, rounding)


# Shapes, and operations on their distances, by their names in `world.yaml`.
_SHAPES: dict[str, Callable[..., Grid]] = {
    shape.__name__: shape for shape in (circle, ellipse, box, segment, polygon, star, heart)
} | {
    "above": lambda x, y, level: level - y,
    "pillar": lambda x, y, center, half: np.abs(x - center) - half,
}
_OPERATIONS: dict[str, Callable[..., Grid]] = {
    "union": lambda *distances: np.minimum.reduce(distances),
    "intersection": lambda *distances: np.maximum.reduce(distances),
    "outside": lambda distance: -distance,
    "ring": lambda distance, half_width: np.abs(distance) - half_width,
}


def signed_distance(x: Grid, y: Grid, described: Mapping[str, Any]) -> Grid:
    """Distance to a shape described as in `world.yaml`: a name and its arguments."""
    ((name, arguments),) = described.items()
    if name in _SHAPES:
        return _SHAPES[name](x, y, *arguments)
    operands = [
        signed_distance(x, y, operand) if isinstance(operand, dict) else operand
        for operand in arguments
    ]
    return _OPERATIONS[name](*operands)


class Part(NamedTuple):
    """Painted part of an object.

    Attributes:
        paint: Name of its colour.
        bevel: Width of its rounded rim.
        outline: Description for `signed_distance`.
    """

    paint: str
    bevel: float
    outline: Mapping[str, Any]


class Shape(NamedTuple):
    """Parts of a class in painting order, and position of the emblem (centre and half size)."""

    parts: list[Part]
    emblem: Sequence[float]


def _shapes(kinds: Mapping[str, Any]) -> dict[str, Shape]:
    return {
        name: Shape([Part(*part) for part in facts["parts"]], facts["emblem"])
        for name, facts in kinds.items()
    }


EMBLEMS: Mapping[str, Any] = WORLD["emblems"]
CLASSES = _shapes(WORLD["classes"])
UNSEEN_CLASSES = _shapes(WORLD["unseen_classes"])


def random_shape(seed: int) -> Shape:
    """Draw a nonsense object of three to six random parts, for training without class names."""
    generator = np.random.default_rng(seed)
    pieces: list[Part] = []
    middle: Sequence[float] = ()
    for number in range(int(generator.integers(3, 7))):
        kind = int(generator.integers(3))
        position, half = generator.uniform(-0.5, 0.5, 2), generator.uniform(0.2, 0.6, 2)
        outlines: list[dict[str, Any]] = [
            {"ellipse": (position, half)},
            {"box": (position, half, 0.05)},
            {"segment": (position, (-position[1], position[0]), 0.4 * half[0])},
        ]
        paint = "accent" if number % 2 else "body"
        pieces.append(Part(paint, 0.5 * min(half), outlines[kind]))
        middle = middle or (position[0], position[1])
    return Shape(pieces, (*middle, 0.3))


def find_shape(kind: str) -> Shape:
    """Return the shape of a class, or of ``random-<seed>``.

    Raises:
        ValueError: If the class is unknown.
    """
    if kind.startswith("random-"):
        return random_shape(int(kind.removeprefix("random-")))
    shapes = CLASSES | UNSEEN_CLASSES
    if kind not in shapes:
        raise ValueError(f"no class {kind!r}; there are {', '.join(shapes)}")
    return shapes[kind]
