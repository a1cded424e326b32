"""The toy world: a scene is a few numbers, and `render` takes its image at any resolution.

It gives the embedded models images whose captions are true by construction, and subjects no
model has seen whose similarity to the truth can be measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dora_diffusion.lab.toy import sdf
from dora_diffusion.lab.toy.backgrounds import (
    BACKGROUNDS,
    coverage,
    mix,
    paint_background,
)
from dora_diffusion.lab.toy.sdf import Grid
from dora_diffusion.lab.toy.shapes import RGB, Part, Shape, find_shape

Pattern = Literal["plain", "striped", "dotted", "checked"]
PATTERNS: tuple[Pattern, ...] = ("plain", "striped", "dotted", "checked")
COLORS: dict[str, RGB] = {
    "red": (0.86, 0.13, 0.13),
    "orange": (0.98, 0.55, 0.10),
    "yellow": (0.97, 0.87, 0.16),
    "green": (0.16, 0.62, 0.22),
    "blue": (0.14, 0.30, 0.86),
    "purple": (0.52, 0.18, 0.70),
    "pink": (0.98, 0.52, 0.72),
    "brown": (0.45, 0.27, 0.13),
    "white": (0.95, 0.95, 0.95),
    "black": (0.10, 0.10, 0.11),
}


@dataclass(frozen=True)
class Emblem:
    """A flat sign painted on the body; ``color`` is its palette name, if it has one."""

    kind: str
    rgb: RGB
    color: str | None = None


@dataclass(frozen=True)
class DrawnSubject:
    """Appearance of one object, wherever it stands.

    Attributes:
        kind: a class name of `shapes`, or ``random-<seed>`` for a nonsense object.
        body: colour of the main surface, 0 to 1.
        accent: colour of handles, roofs, tails and, when ``two_tone``, of the lower half.
        pattern: what is painted on the body.
        pattern_rgb: the pattern's second colour.
        pattern_angle: direction of stripes and checks, radians.
        emblem: a sign on the body.
        two_tone: the body's lower part has the accent colour.
        color: palette name of ``body``, None when it has no honest name.
        accent_color: palette name of ``accent``, None when it has none.
    """

    kind: str
    body: RGB
    accent: RGB
    pattern: Pattern = "plain"
    pattern_rgb: RGB = (0.95, 0.95, 0.94)
    pattern_angle: float = 0.0
    emblem: Emblem | None = None
    two_tone: bool = False
    color: str | None = None
    accent_color: str | None = None

    def __post_init__(self) -> None:
        find_shape(self.kind)
        if self.pattern not in PATTERNS:
            raise ValueError(f"no pattern {self.pattern!r}; there are {', '.join(PATTERNS)}")


@dataclass(frozen=True)
class Scene:
    """A subject in a place.

    Attributes:
        subject: what is shown.
        background: where, a name of `backgrounds.BACKGROUNDS`.
        size: the share of the frame's width that the object spans.
        position: its centre, frame coordinates -1 to 1, y up.
        rotation: radians, counter-clockwise.
        flip: mirrored left to right (an emblem mirrors with it).
        light: where the light comes from, radians; pi / 2 is above.
        seed: fixes the background's details.
    """

    subject: DrawnSubject
    background: str
    size: float = 0.7
    position: tuple[float, float] = (0.0, 0.0)
    rotation: float = 0.0
    flip: bool = False
    light: float = field(default=float(np.pi / 2))
    seed: int = 0

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(
                f"no background {self.background!r}; there are {', '.join(BACKGROUNDS)}"
            )
        if not 0 < self.size <= 2:
            raise ValueError(f"size must be above 0 and at most 2, got {self.size}")


def render(scene: Scene, size: int | tuple[int, int]) -> NDArray[np.uint8]:
    """Render a scene's image.

    Args:
        scene: what to show.
        size: side of a square image, or (width, height); the shorter side spans -1 to 1.

    Returns:
        (height, width, 3) colours.
    """
    width, height = (size, size) if isinstance(size, int) else size
    pixel = 2 / min(width, height)
    columns = ((np.arange(width) + 0.5 - width / 2) * pixel).astype(np.float32)
    rows = ((height / 2 - np.arange(height) - 0.5) * pixel).astype(np.float32)
    x, y = np.meshgrid(columns, rows)
    canvas = paint_background(scene.background, x, y, pixel, scene.seed)
    canvas = canvas * (1 - _shadow(scene, x, y)[..., None])
    canvas = _paint_subject(scene, x, y, pixel, canvas)
    return np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8)


def _shadow(scene: Scene, x: Grid, y: Grid) -> Grid:
    """Darkness of the soft shadow on the ground under the object."""
    strength = 0.25 if scene.background in ("night", "sea", "forest") else 0.42
    center = (
        scene.position[0] - 0.14 * float(np.cos(scene.light)),
        scene.position[1] - 0.92 * scene.size,
    )
    radii = (0.85 * scene.size, 0.16 * scene.size)
    return strength * coverage(sdf.ellipse(x, y, center, radii), 0.14)


def _paint_subject(scene: Scene, x: Grid, y: Grid, pixel: float, canvas: NDArray) -> NDArray:
    """Composite the object's parts over the canvas, shaded by their bevels."""
    u, v = _object_coordinates(scene, x, y)
    shape = find_shape(scene.subject.kind)
    light = np.array((0.75 * np.cos(scene.light), 0.75 * np.sin(scene.light), 0.66), np.float32)
    ambient = 0.45 if scene.background == "night" else 0.6
    tint = np.array((0.86, 0.9, 1.08) if scene.background == "night" else (1, 1, 1), np.float32)
    local_pixel = pixel / scene.size
    body = _body_colors(scene.subject, shape, u, v, local_pixel)
    for part in shape.parts(u, v):
        facing = _facing(part, light, pixel / scene.size)
        diffuse = ambient + (1.1 - ambient) * facing
        highlight = 0.28 * np.clip(4 * (facing - 0.93), 0, 1)
        color = _part_color(part, scene.subject, body) * diffuse[..., None] * tint
        color = np.clip(color + highlight[..., None], 0, 1)
        canvas = mix(canvas, color, coverage(part.distance, local_pixel))
    return canvas


def _object_coordinates(scene: Scene, x: Grid, y: Grid) -> tuple[Grid, Grid]:
    cos, sin = np.float32(np.cos(scene.rotation)), np.float32(np.sin(scene.rotation))
    x, y = (x - scene.position[0]) / scene.size, (y - scene.position[1]) / scene.size
    u, v = cos * x + sin * y, cos * y - sin * x
    return (-u if scene.flip else u), v


def _facing(part: Part, light: NDArray, local_pixel: float) -> Grid:
    """Cosine between light and the part's surface, which bends away over its bevel."""
    down, right = np.gradient(part.distance, local_pixel)
    bend = 0.9 * np.clip(1 + part.distance / part.bevel, 0, 1)
    upward = np.sqrt(np.clip(1 - bend**2, 0.05, 1))
    return np.clip(bend * (right * light[0] - down * light[1]) + upward * light[2], 0, 1)


def _part_color(part: Part, subject: DrawnSubject, body: NDArray) -> NDArray:
    if part.paint == "body":
        return body
    if part.paint == "shade":
        return 0.68 * body
    if part.paint == "lit":
        return np.clip(1.15 * body, 0, 1)
    return np.array(subject.accent if part.paint == "accent" else part.paint, np.float32)


def _body_colors(subject: DrawnSubject, shape: Shape, u: Grid, v: Grid, pixel: float) -> NDArray:
    """The painted surface before lighting, on the object's own coordinates: (h, w, 3)."""
    colors = np.broadcast_to(np.array(subject.body, np.float32), (*u.shape, 3))
    pattern = _pattern_mask(subject, u, v, pixel)
    colors = mix(colors, np.array(subject.pattern_rgb, np.float32), pattern)
    if subject.two_tone:
        colors = mix(colors, np.array(subject.accent, np.float32), coverage(v + 0.12, pixel))
    if subject.emblem is not None:
        at_x, at_y, half = shape.emblem
        distance = sdf.emblem((u - at_x) / half, (v - at_y) / half, subject.emblem.kind) * half
        colors = mix(colors, np.array(subject.emblem.rgb, np.float32), coverage(distance, pixel))
    return colors


def _pattern_mask(subject: DrawnSubject, u: Grid, v: Grid, pixel: float) -> Grid:
    """Mask of the pattern's second colour, 0 to 1; its period is half the object's half size.

    Periods are long on purpose: in a 64-pixel image a stripe is five pixels wide.
    """
    cos, sin = (
        float(np.cos(subject.pattern_angle)),
        float(np.sin(subject.pattern_angle)),
    )
    along, across = u * cos + v * sin, v * cos - u * sin
    if subject.pattern == "striped":
        return _square_wave(across, 0.5, pixel)
    if subject.pattern == "checked":
        a, b = _square_wave(across, 0.84, pixel), _square_wave(along, 0.84, pixel)
        return a * b + (1 - a) * (1 - b)
    if subject.pattern == "dotted":
        spacing = 0.5
        row = np.floor(v / spacing)
        a = u / spacing + 0.5 * (row % 2)
        offset = np.hypot(a - np.floor(a) - 0.5, v / spacing - row - 0.5) * spacing
        return coverage(offset - 0.16, pixel)
    return np.zeros_like(u)


def _square_wave(t: Grid, period: float, pixel: float) -> Grid:
    """1 on half of every period, centred on 0, with edges one pixel soft."""
    phase = np.abs(t / period - np.round(t / period)) * period
    return coverage(phase - period / 4, pixel)
