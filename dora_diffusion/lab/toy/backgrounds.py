"""The backgrounds of the toy world: each paints the whole frame from its coordinates.

``x`` and ``y`` run from -1 to 1 with ``y`` up; ``pixel`` is one pixel's width in those units, so
that edges stay one pixel soft at every resolution. All randomness is drawn in a fixed order and
never per pixel, so one seed gives one image at any size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dora_diffusion.lab.toy.sdf import Grid

Canvas = NDArray[np.float32]


def rgb(red: float, green: float, blue: float) -> NDArray[np.float32]:
    """A colour that broadcasts over a canvas."""
    return np.array((red, green, blue), np.float32)


def mix(first: NDArray, second: NDArray, amount: Grid | float) -> Canvas:
    """Blend two colours or canvases: ``amount`` 0 is the first, 1 the second."""
    weight = np.asarray(amount, np.float32)[..., None]
    return first * (1 - weight) + second * weight


def coverage(distance: Grid, softness: float) -> Grid:
    """Return the share of each pixel that lies inside a signed distance."""
    return np.clip(0.5 - distance / softness, 0, 1)


def value_noise(x: Grid, y: Grid, cells: int, generator: np.random.Generator) -> Grid:
    """Smooth noise of unit variance at its knots, ``cells`` knots across the frame."""
    knots = generator.standard_normal((cells + 2, cells + 2)).astype(np.float32)
    u, v = (x + 1) / 2 * cells, (y + 1) / 2 * cells
    column, row = (
        np.floor(u).astype(int).clip(0, cells),
        np.floor(v).astype(int).clip(0, cells),
    )
    a, b = u - column, v - row
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    low = knots[row, column] * (1 - a) + knots[row, column + 1] * a
    high = knots[row + 1, column] * (1 - a) + knots[row + 1, column + 1] * a
    return low * (1 - b) + high * b


def _landscape(sky: Canvas, ground: Canvas, y: Grid, horizon: float, pixel: float) -> Canvas:
    return mix(sky, ground, coverage(y - horizon, pixel))


def _height(y: Grid, horizon: float) -> Grid:
    """0 at the horizon, 1 at the top of the frame."""
    return np.clip((y - horizon) / (1 - horizon), 0, 1)


def _depth(y: Grid, horizon: float) -> Grid:
    """0 at the horizon, 1 at the bottom of the frame."""
    return np.clip((horizon - y) / (horizon + 1), 0, 1)


def _grass(x: Grid, y: Grid, pixel: float, generator: np.random.Generator) -> Canvas:
    horizon = generator.uniform(-0.1, 0.3)
    sky = mix(rgb(0.80, 0.91, 0.98), rgb(0.45, 0.70, 0.95), _height(y, horizon))
    ground = mix(rgb(0.50, 0.74, 0.32), rgb(0.24, 0.54, 0.15), _depth(y, horizon))
    blades = 0.035 * value_noise(x, y, 14, generator)
    return _landscape(sky, ground + blades[..., None], y, horizon, pixel)


def _sand(x: Grid, y: Grid, pixel: float, generator: np.random.Generator) -> Canvas:
    horizon = generator.uniform(-0.1, 0.3)
    sky = mix(rgb(0.99, 0.92, 0.76), rgb(0.60, 0.80, 0.95), _height(y, horizon))
    ground = mix(rgb(0.96, 0.86, 0.62), rgb(0.86, 0.69, 0.41), _depth(y, horizon))
    ripples = 0.03 * np.sin(20 * y + 3 * np.sin(2 * x + generator.uniform(0, 6)))
    return _landscape(sky, ground + ripples[..., None], y, horizon, pixel)


def _snow(x: Grid, y: Grid, pixel: float, generator: np.random.Generator) -> Canvas:
    horizon = generator.uniform(-0.1, 0.3)
    sky = mix(rgb(0.80, 0.86, 0.93), rgb(0.55, 0.65, 0.78), _height(y, horizon))
    ground = mix(rgb(0.98, 0.99, 1.0), rgb(0.87, 0.92, 0.98), _depth(y, horizon))
    drifts = 0.015 * value_noise(x, y, 6, generator)
    return _landscape(sky, ground + drifts[..., None], y, horizon, pixel)


def _night(x: Grid, y: Grid, pixel: float, generator: np.random.Generator) -> Canvas:
    horizon = generator.uniform(-0.3, 0.1)
    sky = mix(rgb(0.17, 0.17, 0.38), rgb(0.03, 0.03, 0.15), _height(y, horizon))
    for at_x, at_y in generator.uniform((-1, -0.1), (1, 1), (12, 2)):
        glow = np.clip(1.3 - np.hypot(x - at_x, y - at_y) / 0.035, 0, 1)
        sky = sky + 0.7 * glow[..., None]
    moon_x, moon_y = generator.uniform((-0.85, 0.65), (0.85, 0.85))
    moon = coverage(np.hypot(x - moon_x, y - moon_y) - 0.14, pixel)
    sky = mix(sky, rgb(0.97, 0.95, 0.80), moon)
    ground = mix(rgb(0.11, 0.13, 0.21), rgb(0.05, 0.06, 0.11), _depth(y, horizon))
    return _landscape(sky, ground, y, horizon, pixel)


def _sea(x: Grid, y: Grid, pixel: float, generator: np.random.Generator) -> Canvas:
    horizon = generator.uniform(-0.1, 0.3)
    sky = mix(rgb(0.90, 0.95, 0.98), rgb(0.50, 0.78, 0.96), _height(y, horizon))
    water = mix(rgb(0.16, 0.55, 0.76), rgb(0.04, 0.30, 0.58), _depth(y, horizon))
    waves = 0.06 * np.sin(24 * y + 1.6 * np.sin(5 * x + generator.uniform(0, 6)))
    return _landscape(sky, water + waves[..., None], y, horizon, pixel)


def _brick(x: Grid, y: Grid, pixel: float, generator: np.random.Generator) -> Canvas:
    width, height, joint = 0.4, 0.2, 0.02
    v = (y + generator.uniform(0, height)) / height
    row = np.floor(v)
    u = (x + generator.uniform(0, width) + 0.5 * width * (row % 2)) / width
    column = np.floor(u)
    to_edge = np.minimum(
        np.minimum(u - column, 1 - u + column) * width,
        np.minimum(v - row, 1 - v + row) * height,
    )
    tone = generator.uniform(-0.05, 0.05, 97).astype(np.float32)
    shade = tone[(7 * row + 13 * column).astype(int) % 97]
    brick = rgb(0.68, 0.30, 0.22) + shade[..., None]
    # 0.02 of softness at least: thinner joints than a pixel would flicker with the resolution.
    wall = mix(brick, rgb(0.82, 0.76, 0.70), coverage(to_edge - joint, max(pixel, 0.02)))
    return _landscape(wall, np.broadcast_to(rgb(0.56, 0.54, 0.53), wall.shape), y, -0.78, pixel)


def _wood(x: Grid, y: Grid, pixel: float, generator: np.random.Generator) -> Canvas:
    horizon = generator.uniform(0.0, 0.4)
    wall = mix(rgb(0.93, 0.89, 0.80), rgb(0.86, 0.82, 0.74), _height(y, horizon))
    # Boards run towards a vanishing point above the horizon.
    spread = 1.7 - y + horizon
    u = (x - generator.uniform(-0.3, 0.3)) / spread * 3.2
    board = np.floor(u)
    tone = generator.uniform(-0.05, 0.05, 31).astype(np.float32)[board.astype(int) % 31]
    gap = coverage((np.minimum(u - board, 1 - u + board) - 0.04) * spread / 3.2, max(pixel, 0.03))
    floor = mix(rgb(0.72, 0.47, 0.25) + tone[..., None], rgb(0.42, 0.26, 0.13), gap)
    return _landscape(wall, floor, y, horizon, pixel)


def _studio(x: Grid, y: Grid, pixel: float, generator: np.random.Generator) -> Canvas:
    level = generator.uniform(0.5, 0.7)
    glow = np.clip(1 - np.hypot(x - generator.uniform(-0.3, 0.3), y - 0.2) / 1.3, 0, 1)
    wall = (level + 0.14 * glow)[..., None] * rgb(1.0, 1.0, 1.01)
    return mix(wall, 0.88 * wall, np.clip(0.5 - (y + 0.4) / 0.5, 0, 1))


def _forest(x: Grid, y: Grid, pixel: float, generator: np.random.Generator) -> Canvas:
    horizon = generator.uniform(-0.4, -0.1)
    leaves = mix(rgb(0.10, 0.30, 0.17), rgb(0.05, 0.17, 0.11), _height(y, horizon))
    leaves = leaves + 0.03 * value_noise(x, y, 9, generator)[..., None]
    for k, shift in enumerate(generator.uniform(-0.12, 0.12, 5)):
        lean, at = generator.uniform(-0.05, 0.05), -0.88 + 0.44 * k + shift
        trunk = coverage(np.abs(x - at - lean * y) - generator.uniform(0.05, 0.1), pixel)
        leaves = mix(leaves, rgb(0.30, 0.20, 0.13), trunk)
    ground = mix(rgb(0.28, 0.27, 0.13), rgb(0.18, 0.20, 0.09), _depth(y, horizon))
    return _landscape(leaves, ground, y, horizon, pixel)


def _sunset(x: Grid, y: Grid, pixel: float, generator: np.random.Generator) -> Canvas:
    horizon = generator.uniform(-0.3, 0.1)
    height = _height(y, horizon)
    sky = mix(rgb(1.0, 0.66, 0.30), rgb(0.93, 0.36, 0.42), np.clip(2 * height, 0, 1))
    sky = mix(sky, rgb(0.42, 0.22, 0.50), np.clip(2 * height - 1, 0, 1))
    sun = coverage(np.hypot(x - generator.uniform(-0.8, 0.8), y - horizon - 0.05) - 0.3, pixel)
    sky = mix(sky, rgb(1.0, 0.93, 0.62), sun)
    ground = mix(rgb(0.36, 0.20, 0.27), rgb(0.20, 0.11, 0.19), _depth(y, horizon))
    return _landscape(sky, ground, y, horizon, pixel)


Painter = Callable[[Grid, Grid, float, np.random.Generator], Canvas]
BACKGROUNDS: dict[str, Painter] = {
    "grass": _grass,
    "sand": _sand,
    "snow": _snow,
    "night": _night,
    "sea": _sea,
    "brick": _brick,
    "wood": _wood,
    "studio": _studio,
    "forest": _forest,
    "sunset": _sunset,
}


PLACES: dict[str, tuple[str, ...]] = {
    "grass": ("on the grass", "on grass", "in a meadow", "on a green lawn"),
    "sand": ("on the beach", "on the sand", "on sand", "in the desert"),
    "snow": ("in the snow", "on the snow", "on snow", "in winter"),
    "night": ("at night", "under the night sky", "under the stars", "in the dark"),
    "sea": ("in the sea", "on the water", "in the ocean", "at sea"),
    "brick": ("in front of a brick wall", "by a brick wall", "against a brick wall"),
    "wood": ("on a wooden floor", "on the wooden floor", "on wooden planks", "on wood"),
    "studio": ("in a studio", "on a grey background", "in a grey studio"),
    "forest": ("in the forest", "in a forest", "in the woods", "among trees"),
    "sunset": ("at sunset", "in front of a sunset", "in the evening"),
}
"""Phrases in captions for each background."""


def paint_background(name: str, x: Grid, y: Grid, pixel: float, seed: int) -> Canvas:
    """Paint a named background: grids (h, w) -> colours (h, w, 3), about 0 to 1.

    Raises:
        ValueError: no such background.
    """
    if name not in BACKGROUNDS:
        raise ValueError(f"no background {name!r}; there are {', '.join(BACKGROUNDS)}")
    return BACKGROUNDS[name](x, y, pixel, np.random.default_rng(seed))
