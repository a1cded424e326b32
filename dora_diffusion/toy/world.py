"""The toy world: scenes of a few numbers, which `render` draws at any resolution.

It provides training images with exact captions for the embedded models, and unseen subjects with
true images for measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dora_diffusion.toy.shapes import (
    EMBLEMS,
    RGB,
    WORLD,
    Grid,
    Shape,
    ellipse,
    find_shape,
    signed_distance,
)

Canvas = NDArray[np.float32]
Pattern = Literal["plain", "striped", "dotted", "checked"]
PATTERNS: tuple[Pattern, ...] = ("plain", "striped", "dotted", "checked")
COLORS: dict[str, RGB] = {name: tuple(rgb) for name, rgb in WORLD["colors"].items()}
PLACES: Mapping[str, list[str]] = {n: b["phrases"] for n, b in WORLD["backgrounds"].items()}
"""Phrases in captions for each background."""
BACKGROUNDS = tuple(PLACES)


@dataclass(frozen=True)
class Emblem:
    """A flat emblem on the body; ``color`` is its palette name, if it has one."""

    kind: str
    rgb: RGB
    color: str | None = None


@dataclass(frozen=True)
class DrawnSubject:
    """Appearance of an object.

    Attributes:
        kind: A class name of `shapes`, or ``random-<seed>`` for a nonsense object.
        body: Colour of the main surface, 0 to 1.
        accent: Colour of handles, roofs, tails and, with ``two_tone``, of the lower half.
        pattern: Pattern on the body.
        pattern_rgb: Second colour of the pattern.
        pattern_angle: Direction of stripes and checks, in radians.
        emblem: Emblem on the body.
        two_tone: The body's lower part has the accent colour.
        color: Palette name of ``body``; None if no name fits.
        accent_color: Palette name of ``accent``; None if no name fits.
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
    """A subject on a background.

    Attributes:
        subject: The subject.
        background: A name of `BACKGROUNDS`.
        size: Fraction of the frame's width that the object spans.
        position: Centre of the object, in frame coordinates from -1 to 1, y up.
        rotation: Rotation in radians, counter-clockwise.
        flip: Mirror left to right, with the emblem.
        light: Direction of the light in radians; pi / 2 is above.
        seed: Seed of the background's details.
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
        scene: The scene.
        size: Side of a square image, or (width, height); the shorter side spans -1 to 1.

    Returns:
        Colours (height, width, 3).
    """
    x, y, pixel = _grid(size)
    canvas = paint_background(scene, x, y, pixel)
    canvas = canvas * (1 - _shadow(scene, x, y)[..., None])
    canvas = _paint_subject(scene, x, y, pixel, canvas)
    return np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8)


def render_mask(scene: Scene, size: int | tuple[int, int]) -> NDArray[np.uint8]:
    """Render the opacity of a scene's object, (height, width): 255 for covered pixels."""
    x, y, pixel = _grid(size)
    black = np.zeros((*x.shape, 3), np.float32)
    over = [_paint_subject(scene, x, y, pixel, canvas) for canvas in (black, 1 + black)]
    # Covered pixels look the same on black and on white.
    opacity = 1 - (over[1] - over[0]).mean(axis=2)
    return np.round(np.clip(opacity, 0, 1) * 255).astype(np.uint8)


def _grid(size: int | tuple[int, int]) -> tuple[Grid, Grid, float]:
    """Coordinates of an image's pixels, each (height, width), and the side of a pixel."""
    width, height = (size, size) if isinstance(size, int) else size
    pixel = 2 / min(width, height)
    columns = ((np.arange(width) + 0.5 - width / 2) * pixel).astype(np.float32)
    rows = ((height / 2 - np.arange(height) - 0.5) * pixel).astype(np.float32)
    x, y = np.meshgrid(columns, rows)
    return x, y, pixel


def _shadow(scene: Scene, x: Grid, y: Grid) -> Grid:
    """Darkness of the soft shadow on the ground under the object."""
    strength = 0.25 if scene.background in ("night", "sea", "forest") else 0.42
    center = (
        scene.position[0] - 0.14 * float(np.cos(scene.light)),
        scene.position[1] - 0.92 * scene.size,
    )
    radii = (0.85 * scene.size, 0.16 * scene.size)
    return strength * coverage(ellipse(x, y, center, radii), 0.14)


def _paint_subject(scene: Scene, x: Grid, y: Grid, pixel: float, canvas: Canvas) -> Canvas:
    """Composite the object's parts over the canvas, shaded by their bevels."""
    cos, sin = np.float32(np.cos(scene.rotation)), np.float32(np.sin(scene.rotation))
    x, y = (x - scene.position[0]) / scene.size, (y - scene.position[1]) / scene.size
    u, v = cos * x + sin * y, cos * y - sin * x
    u = -u if scene.flip else u
    subject, is_night = scene.subject, scene.background == "night"
    shape = find_shape(subject.kind)
    light = np.array((0.75 * np.cos(scene.light), 0.75 * np.sin(scene.light), 0.66), np.float32)
    ambient = 0.45 if is_night else 0.6
    tint = np.array((0.86, 0.9, 1.08) if is_night else (1, 1, 1), np.float32)
    local_pixel = pixel / scene.size
    body = _body_colors(subject, shape, u, v, local_pixel)
    paints = {
        "body": body,
        "shade": 0.68 * body,
        "lit": np.clip(1.15 * body, 0, 1),
        **{name: rgb(*color) for name, color in WORLD["paints"].items()},
        "accent": rgb(*subject.accent),
    }
    for part in shape.parts:
        distance = signed_distance(u, v, part.outline)
        facing = _facing(distance, part.bevel, light, local_pixel)
        diffuse = ambient + (1.1 - ambient) * facing
        highlight = 0.28 * np.clip(4 * (facing - 0.93), 0, 1)
        color = paints[part.paint] * diffuse[..., None] * tint
        color = np.clip(color + highlight[..., None], 0, 1)
        canvas = mix(canvas, color, coverage(distance, local_pixel))
    return canvas


def _facing(distance: Grid, bevel: float, light: NDArray, local_pixel: float) -> Grid:
    """Cosine between light and a part's surface, which bends away over its bevel."""
    down, right = np.gradient(distance, local_pixel)
    bend = 0.9 * np.clip(1 + distance / bevel, 0, 1)
    upward = np.sqrt(np.clip(1 - bend**2, 0.05, 1))
    return np.clip(bend * (right * light[0] - down * light[1]) + upward * light[2], 0, 1)


def _body_colors(subject: DrawnSubject, shape: Shape, u: Grid, v: Grid, pixel: float) -> NDArray:
    """Colours of the surface before lighting, in the object's coordinates: (h, w, 3)."""
    colors = np.broadcast_to(rgb(*subject.body), (*u.shape, 3))
    pattern = _pattern_mask(subject, u, v, pixel)
    colors = mix(colors, rgb(*subject.pattern_rgb), pattern)
    if subject.two_tone:
        colors = mix(colors, rgb(*subject.accent), coverage(v + 0.12, pixel))
    if subject.emblem is not None:
        at_x, at_y, half = shape.emblem
        outline = EMBLEMS[subject.emblem.kind]
        distance = signed_distance((u - at_x) / half, (v - at_y) / half, outline) * half
        colors = mix(colors, rgb(*subject.emblem.rgb), coverage(distance, pixel))
    return colors


def _pattern_mask(subject: DrawnSubject, u: Grid, v: Grid, pixel: float) -> Grid:
    """Mask of the pattern's second colour, 0 to 1; its period is half the object's half size.

    Periods are long on purpose: in a 64-pixel image a stripe is five pixels wide.
    """
    cos, sin = float(np.cos(subject.pattern_angle)), float(np.sin(subject.pattern_angle))
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
    """1 on half of every period, centred on 0, with soft edges of one pixel."""
    phase = np.abs(t / period - np.round(t / period)) * period
    return coverage(phase - period / 4, pixel)


def rgb(red: float, green: float, blue: float) -> NDArray[np.float32]:
    """Colour that broadcasts over a canvas."""
    return np.array((red, green, blue), np.float32)


def mix(first: NDArray, second: NDArray, amount: Grid | float) -> Canvas:
    """Blend two colours or canvases: ``amount`` 0 is the first, 1 the second."""
    weight = np.asarray(amount, np.float32)[..., None]
    return first * (1 - weight) + second * weight


def coverage(distance: Grid, softness: float) -> Grid:
    """Return the fraction of each pixel inside a signed distance."""
    return np.clip(0.5 - distance / softness, 0, 1)


def paint_background(scene: Scene, x: Grid, y: Grid, pixel: float) -> Canvas:
    """Paint a scene's background: grids (h, w) -> colours (h, w, 3), about 0 to 1.

    Random numbers are drawn in a fixed order and never per pixel, so a seed gives the same image at
    any size. Soft edges are one pixel wide at every resolution.
    """
    name, generator = scene.background, np.random.default_rng(scene.seed)
    if name in _ROOMS:
        return _ROOMS[name](x, y, pixel, generator)
    facts = WORLD["backgrounds"][name]
    horizon = generator.uniform(*facts["horizon"])
    # 0 at the horizon, 1 at the top and at the bottom of the frame.
    height = np.clip((y - horizon) / (1 - horizon), 0, 1)
    depth = np.clip((horizon - y) / (horizon + 1), 0, 1)
    low, high, *top = (rgb(*color) for color in facts["sky"])
    sky = mix(low, high, height)
    far, near = (rgb(*color) for color in facts["ground"])
    ground = mix(far, near, depth)
    if "noise" in facts:
        strength, cells = facts["noise"]
        ground = ground + (strength * value_noise(x, y, cells, generator))[..., None]
    if "waves" in facts:
        strength, frequency, bend, across = facts["waves"]
        phase = frequency * y + bend * np.sin(across * x + generator.uniform(0, 6))
        ground = ground + (strength * np.sin(phase))[..., None]
    if name == "night":
        sky = _stars_and_moon(sky, x, y, pixel, generator)
    elif name == "forest":
        sky = _trunks(sky, x, y, pixel, generator)
    elif name == "sunset":
        sky = mix(mix(low, high, np.clip(2 * height, 0, 1)), top[0],
                  np.clip(2 * height - 1, 0, 1))  # fmt: skip
        sun = np.hypot(x - generator.uniform(-0.8, 0.8), y - horizon - 0.05) - 0.3
        sky = mix(sky, rgb(1.0, 0.93, 0.62), coverage(sun, pixel))
    return mix(sky, ground, coverage(y - horizon, pixel))


def value_noise(x: Grid, y: Grid, cells: int, generator: np.random.Generator) -> Grid:
    """Smooth noise of unit variance at its knots, ``cells`` knots across the frame."""
    knots = generator.standard_normal((cells + 2, cells + 2)).astype(np.float32)
    u, v = (x + 1) / 2 * cells, (y + 1) / 2 * cells
    column, row = (np.floor(t).astype(int).clip(0, cells) for t in (u, v))
    a, b = u - column, v - row
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    low = knots[row, column] * (1 - a) + knots[row, column + 1] * a
    high = knots[row + 1, column] * (1 - a) + knots[row + 1, column + 1] * a
    return low * (1 - b) + high * b


def _stars_and_moon(
    sky: Canvas, x: Grid, y: Grid, pixel: float, generator: np.random.Generator
) -> Canvas:
    for at_x, at_y in generator.uniform((-1, -0.1), (1, 1), (12, 2)):
        glow = np.clip(1.3 - np.hypot(x - at_x, y - at_y) / 0.035, 0, 1)
        sky = sky + 0.7 * glow[..., None]
    moon_x, moon_y = generator.uniform((-0.85, 0.65), (0.85, 0.85))
    moon = coverage(np.hypot(x - moon_x, y - moon_y) - 0.14, pixel)
    return mix(sky, rgb(0.97, 0.95, 0.80), moon)


def _brick(x: Grid, y: Grid, pixel: float, generator: np.random.Generator) -> Canvas:
    width, height, joint = 0.4, 0.2, 0.02
    v = (y + generator.uniform(0, height)) / height
    row = np.floor(v)
    u = (x + generator.uniform(0, width) + 0.5 * width * (row % 2)) / width
    column = np.floor(u)
    to_edge = np.minimum(
        np.minimum(u - column, 1 - u + column) * width, np.minimum(v - row, 1 - v + row) * height
    )
    tone = generator.uniform(-0.05, 0.05, 97).astype(np.float32)
    shade = tone[(7 * row + 13 * column).astype(int) % 97]
    brick = rgb(0.68, 0.30, 0.22) + shade[..., None]
    # At least 0.02 of softness: joints thinner than a pixel would flicker with the resolution.
    wall = mix(brick, rgb(0.82, 0.76, 0.70), coverage(to_edge - joint, max(pixel, 0.02)))
    return mix(wall, rgb(0.56, 0.54, 0.53), coverage(y + 0.78, pixel))


def _wood(x: Grid, y: Grid, pixel: float, generator: np.random.Generator) -> Canvas:
    horizon = generator.uniform(0.0, 0.4)
    height = np.clip((y - horizon) / (1 - horizon), 0, 1)
    wall = mix(rgb(0.93, 0.89, 0.80), rgb(0.86, 0.82, 0.74), height)
    # Boards run towards a vanishing point above the horizon.
    spread = 1.7 - y + horizon
    u = (x - generator.uniform(-0.3, 0.3)) / spread * 3.2
    board = np.floor(u)
    tone = generator.uniform(-0.05, 0.05, 31).astype(np.float32)[board.astype(int) % 31]
    gap = coverage((np.minimum(u - board, 1 - u + board) - 0.04) * spread / 3.2, max(pixel, 0.03))
    floor = mix(rgb(0.72, 0.47, 0.25) + tone[..., None], rgb(0.42, 0.26, 0.13), gap)
    return mix(wall, floor, coverage(y - horizon, pixel))


def _trunks(
    leaves: Canvas, x: Grid, y: Grid, pixel: float, generator: np.random.Generator
) -> Canvas:
    leaves = leaves + 0.03 * value_noise(x, y, 9, generator)[..., None]
    for k, shift in enumerate(generator.uniform(-0.12, 0.12, 5)):
        lean, at = generator.uniform(-0.05, 0.05), -0.88 + 0.44 * k + shift
        trunk = coverage(np.abs(x - at - lean * y) - generator.uniform(0.05, 0.1), pixel)
        leaves = mix(leaves, rgb(0.30, 0.20, 0.13), trunk)
    return leaves


def _studio(x: Grid, y: Grid, pixel: float, generator: np.random.Generator) -> Canvas:
    level = generator.uniform(0.5, 0.7)
    glow = np.clip(1 - np.hypot(x - generator.uniform(-0.3, 0.3), y - 0.2) / 1.3, 0, 1)
    wall = (level + 0.14 * glow)[..., None] * rgb(1.0, 1.0, 1.01)
    return mix(wall, 0.88 * wall, np.clip(0.5 - (y + 0.4) / 0.5, 0, 1))


_ROOMS = {"brick": _brick, "wood": _wood, "studio": _studio}
