"""The objects of the toy world, each a list of parts painted in order.

An object lives in the square from -1 to 1, stands on about y = -0.9 and fills most of it. The
classes in `CLASSES` are what the embedded models learn by name; those in `UNSEEN_CLASSES` have a
shape but no word in their training captions, so they can play the unknown subject.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dora_diffusion.lab.toy import sdf
from dora_diffusion.lab.toy.sdf import Grid, Point

RGB = tuple[float, float, float]
Paint = Literal["body", "shade", "lit", "accent"] | RGB

DARK: RGB = (0.11, 0.11, 0.13)
RUBBER: RGB = (0.16, 0.16, 0.18)
BARK: RGB = (0.43, 0.28, 0.16)
CREAM: RGB = (0.95, 0.90, 0.78)
GLASS: RGB = (0.62, 0.83, 0.95)
WHITE: RGB = (0.97, 0.97, 0.97)


@dataclass(frozen=True)
class Part:
    """One painted piece: its signed distance, its paint and how deep its rounded rim reaches."""

    distance: Grid
    paint: Paint
    bevel: float


@dataclass(frozen=True)
class Shape:
    """Parts of a class and how to build them, and its emblem's place (centre and half size)."""

    parts: Callable[[Grid, Grid], list[Part]]
    emblem: tuple[float, float, float] = (0.0, 0.0, 0.42)


def _ball(x: Grid, y: Grid) -> list[Part]:
    return [Part(sdf.circle(x, y, (0, 0), 0.92), "body", 0.92)]


def _cube(x: Grid, y: Grid) -> list[Part]:
    front: list[Point] = [(-0.9, -0.9), (0.4, -0.9), (0.4, 0.4), (-0.9, 0.4)]
    top: list[Point] = [(-0.9, 0.4), (0.4, 0.4), (0.88, 0.86), (-0.36, 0.86)]
    side: list[Point] = [(0.4, -0.9), (0.88, -0.4), (0.88, 0.86), (0.4, 0.4)]
    return [
        Part(sdf.polygon(x, y, side, 0.03), "shade", 0.06),
        Part(sdf.polygon(x, y, top, 0.03), "lit", 0.06),
        Part(sdf.polygon(x, y, front, 0.03), "body", 0.06),
    ]


def _mug(x: Grid, y: Grid) -> list[Part]:
    handle = sdf.ring(sdf.ellipse(x, y, (0.48, -0.08), (0.4, 0.45)), 0.1)
    wall = sdf.union(
        sdf.box(x, y, (-0.2, -0.1), (0.66, 0.74), 0.16),
        sdf.ellipse(x, y, (-0.2, 0.6), (0.66, 0.2)),
    )
    return [
        Part(handle, "accent", 0.1),
        Part(wall, "body", 0.5),
        Part(sdf.ellipse(x, y, (-0.2, 0.62), (0.56, 0.14)), DARK, 0.1),
    ]


def _teapot(x: Grid, y: Grid) -> list[Part]:
    spout: list[Point] = [
        (0.4, -0.5),
        (0.55, 0.05),
        (0.78, 0.42),
        (0.98, 0.42),
        (0.75, -0.1),
    ]
    return [
        Part(
            sdf.ring(sdf.ellipse(x, y, (-0.62, -0.1), (0.32, 0.4)), 0.085),
            "accent",
            0.09,
        ),
        Part(sdf.polygon(x, y, spout, 0.02), "accent", 0.15),
        Part(sdf.ellipse(x, y, (0, -0.22), (0.72, 0.66)), "body", 0.6),
        Part(sdf.ellipse(x, y, (0, 0.44), (0.4, 0.13)), "accent", 0.13),
        Part(sdf.circle(x, y, (0, 0.68), 0.15), "accent", 0.15),
    ]


def _bottle(x: Grid, y: Grid) -> list[Part]:
    shoulders: list[Point] = [(-0.5, 0.12), (0.5, 0.12), (0.2, 0.48), (-0.2, 0.48)]
    glass = sdf.union(
        sdf.box(x, y, (0, -0.4), (0.56, 0.56), 0.14),
        sdf.polygon(x, y, shoulders, 0.05),
        sdf.box(x, y, (0, 0.45), (0.21, 0.35)),
    )
    return [
        Part(glass, "body", 0.4),
        Part(sdf.box(x, y, (0, 0.84), (0.27, 0.14), 0.05), "accent", 0.1),
    ]


def _star(x: Grid, y: Grid) -> list[Part]:
    return [Part(sdf.polygon(x, y, sdf.star_points(0.46, 0.95), 0.04), "body", 0.3)]


def _heart(x: Grid, y: Grid) -> list[Part]:
    return [Part(sdf.polygon(x, y, sdf.heart_points(), -0.03), "body", 0.5)]


def _tree(x: Grid, y: Grid) -> list[Part]:
    crown = sdf.union(
        sdf.circle(x, y, (-0.42, 0.08), 0.45),
        sdf.circle(x, y, (0.42, 0.08), 0.45),
        sdf.circle(x, y, (0, 0.45), 0.5),
        sdf.circle(x, y, (0, 0.1), 0.4),
    )
    return [
        Part(sdf.box(x, y, (0, -0.6), (0.15, 0.35), 0.03), BARK, 0.15),
        Part(crown, "body", 0.4),
    ]


def _mushroom(x: Grid, y: Grid) -> list[Part]:
    stem = sdf.box(x, y, (0, -0.45), (0.27, 0.48), 0.14)
    cap = sdf.intersection(sdf.ellipse(x, y, (0, -0.02), (0.95, 0.9)), -0.04 - y)
    return [Part(stem, CREAM, 0.25), Part(cap, "body", 0.5)]


def _car(x: Grid, y: Grid) -> list[Part]:
    cabin: list[Point] = [(-0.62, 0.05), (-0.38, 0.52), (0.28, 0.52), (0.6, 0.05)]
    panes: list[Point] = [(-0.46, 0.1), (-0.31, 0.42), (0.22, 0.42), (0.42, 0.1)]
    window = sdf.intersection(sdf.polygon(x, y, panes), 0.05 - np.abs(x + 0.06))
    tyre_and_hub: tuple[tuple[float, Paint], ...] = ((0.26, RUBBER), (0.11, "accent"))
    wheels = [
        Part(sdf.circle(x, y, (at, -0.46), radius), paint, 0.1)
        for at in (-0.52, 0.52)
        for radius, paint in tyre_and_hub
    ]
    return [
        Part(sdf.polygon(x, y, cabin, 0.06), "body", 0.2),
        Part(window, GLASS, 0.05),
        Part(sdf.box(x, y, (0, -0.2), (0.96, 0.3), 0.14), "body", 0.25),
        *wheels,
    ]


def _house(x: Grid, y: Grid) -> list[Part]:
    roof: list[Point] = [(-0.92, 0.12), (0.92, 0.12), (0, 0.9)]
    return [
        Part(sdf.box(x, y, (0, -0.38), (0.74, 0.54)), "body", 0.06),
        Part(sdf.polygon(x, y, roof, 0.05), "accent", 0.08),
        Part(sdf.box(x, y, (-0.32, -0.57), (0.2, 0.34)), BARK, 0.05),
        Part(sdf.box(x, y, (0.34, -0.3), (0.2, 0.2)), GLASS, 0.05),
    ]


def _fish(x: Grid, y: Grid) -> list[Part]:
    tail: list[Point] = [(-0.45, 0.0), (-0.92, 0.5), (-0.8, 0.0), (-0.92, -0.5)]
    fin: list[Point] = [(-0.25, 0.4), (0.05, 0.82), (0.38, 0.35)]
    return [
        Part(sdf.polygon(x, y, tail, 0.05), "accent", 0.15),
        Part(sdf.polygon(x, y, fin, 0.05), "accent", 0.15),
        Part(sdf.ellipse(x, y, (0.18, 0), (0.78, 0.52)), "body", 0.5),
        Part(sdf.circle(x, y, (0.62, 0.14), 0.12), WHITE, 0.1),
        Part(sdf.circle(x, y, (0.65, 0.14), 0.06), DARK, 0.06),
    ]


def _robot(x: Grid, y: Grid) -> list[Part]:
    limbs = [
        Part(sdf.box(x, y, (side * 0.24, -0.74), (0.15, 0.2), 0.04), "accent", 0.1)
        for side in (-1, 1)
    ] + [
        Part(
            sdf.segment(x, y, (side * 0.6, 0), (side * 0.78, -0.42), 0.12),
            "accent",
            0.1,
        )
        for side in (-1, 1)
    ]
    eyes = [
        Part(sdf.circle(x, y, (side * 0.2, 0.52), radius), paint, 0.1)
        for side in (-1, 1)
        for radius, paint in ((0.13, WHITE), (0.06, DARK))
    ]
    return [
        *limbs,
        Part(sdf.box(x, y, (0, -0.2), (0.54, 0.42), 0.1), "body", 0.2),
        Part(sdf.circle(x, y, (0, 0.92), 0.09), "accent", 0.09),
        Part(sdf.box(x, y, (0, 0.53), (0.48, 0.31), 0.1), "body", 0.2),
        *eyes,
    ]


def _rocket(x: Grid, y: Grid) -> list[Part]:
    fins: list[Point] = [
        (-0.75, -0.85),
        (-0.3, 0.1),
        (0.3, 0.1),
        (0.75, -0.85),
        (0, -0.45),
    ]
    hull = sdf.intersection(
        sdf.circle(x, y, (-0.75, -0.1), 1.25),
        sdf.circle(x, y, (0.75, -0.1), 1.25),
        -0.75 - y,
    )
    return [
        Part(sdf.polygon(x, y, fins, 0.04), "accent", 0.1),
        Part(hull, "body", 0.4),
        Part(sdf.circle(x, y, (0, 0.3), 0.2), "accent", 0.08),
        Part(sdf.circle(x, y, (0, 0.3), 0.12), GLASS, 0.08),
    ]


def _duck(x: Grid, y: Grid) -> list[Part]:
    beak: list[Point] = [(0.6, 0.52), (0.95, 0.42), (0.6, 0.32)]
    return [
        Part(sdf.polygon(x, y, beak, 0.05), "accent", 0.1),
        Part(sdf.circle(x, y, (0.35, 0.48), 0.38), "body", 0.38),
        Part(sdf.ellipse(x, y, (-0.1, -0.35), (0.82, 0.5)), "body", 0.5),
        Part(sdf.ellipse(x, y, (-0.3, -0.25), (0.38, 0.22)), "accent", 0.2),
        Part(sdf.circle(x, y, (0.46, 0.58), 0.08), DARK, 0.08),
    ]


CLASSES: dict[str, Shape] = {
    "ball": Shape(_ball, (0, 0, 0.46)),
    "cube": Shape(_cube, (-0.25, -0.25, 0.44)),
    "mug": Shape(_mug, (-0.2, -0.15, 0.42)),
    "teapot": Shape(_teapot, (0, -0.24, 0.42)),
    "bottle": Shape(_bottle, (0, -0.4, 0.4)),
    "star": Shape(_star, (0, -0.04, 0.32)),
    "heart": Shape(_heart, (0, 0.12, 0.4)),
    "tree": Shape(_tree, (0, 0.3, 0.42)),
    "mushroom": Shape(_mushroom, (0, 0.4, 0.36)),
    "car": Shape(_car, (0, -0.2, 0.24)),
    "house": Shape(_house, (0, 0.4, 0.24)),
    "fish": Shape(_fish, (0.12, -0.06, 0.36)),
}
UNSEEN_CLASSES: dict[str, Shape] = {
    "robot": Shape(_robot, (0, -0.2, 0.32)),
    "rocket": Shape(_rocket, (0, -0.25, 0.28)),
    "duck": Shape(_duck, (0.3, -0.4, 0.3)),
}
FILLERS: tuple[str, ...] = ("toy", "object", "thing")
"""Words that captions have for a thing of any class."""


def random_shape(seed: int) -> Shape:
    """A nonsense object of three to six random pieces, for training without class names."""
    generator = np.random.default_rng(seed)
    plan = [
        (
            int(generator.integers(3)),
            generator.uniform(-0.5, 0.5, 2),
            generator.uniform(0.2, 0.6, 2),
        )
        for _ in range(int(generator.integers(3, 7)))
    ]

    def parts(x: Grid, y: Grid) -> list[Part]:
        pieces = []
        for number, (kind, center, half) in enumerate(plan):
            at, extent = (center[0], center[1]), (half[0], half[1])
            if kind == 0:
                distance = sdf.ellipse(x, y, at, extent)
            elif kind == 1:
                distance = sdf.box(x, y, at, extent, 0.05)
            else:
                distance = sdf.segment(x, y, at, (-at[1], at[0]), 0.4 * extent[0])
            pieces.append(Part(distance, "accent" if number % 2 else "body", 0.5 * min(extent)))
        return pieces

    return Shape(parts, (plan[0][1][0], plan[0][1][1], 0.3))


def find_shape(kind: str) -> Shape:
    """The shape of a class name, or of ``random-<seed>``.

    Raises:
        ValueError: no such class.
    """
    if kind.startswith("random-"):
        return random_shape(int(kind.removeprefix("random-")))
    shapes = CLASSES | UNSEEN_CLASSES
    if kind not in shapes:
        raise ValueError(f"no class {kind!r}; there are {', '.join(shapes)}")
    return shapes[kind]
