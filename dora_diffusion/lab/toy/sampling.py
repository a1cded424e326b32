"""Random subjects and random views of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dora_diffusion.lab.toy import sdf
from dora_diffusion.lab.toy.shapes import CLASSES, RGB
from dora_diffusion.lab.toy.world import COLORS, PATTERNS, DrawnSubject, Emblem, Scene


def contrasting(body: RGB) -> RGB:
    """Near-white on dark colours, near-black on light ones: the pattern of ordinary objects."""
    luminance = 0.3 * body[0] + 0.59 * body[1] + 0.11 * body[2]
    return (0.12, 0.12, 0.14) if luminance > 0.68 else (0.95, 0.95, 0.94)


def sample_subject(generator: np.random.Generator, kind: str | None = None) -> DrawnSubject:
    """Draw an ordinary object: palette colours, at times two-tone or with an emblem."""
    kind = kind or str(generator.choice(list(CLASSES)))
    color = str(generator.choice(list(COLORS)))
    body = _jitter(COLORS[color], generator)
    subject = DrawnSubject(
        kind=kind,
        body=body,
        accent=_scaled(body, 0.72),
        pattern=PATTERNS[generator.choice(4, p=(0.46, 0.2, 0.2, 0.14))],
        pattern_rgb=contrasting(body),
        pattern_angle=float(generator.choice((0.0, 0.8))),
        color=color,
        accent_color=color,
    )
    extra = generator.random()
    other = str(generator.choice([name for name in COLORS if name != color]))
    other_rgb = _jitter(COLORS[other], generator)
    if extra < 0.15:
        return replace(subject, accent=other_rgb, accent_color=other)
    if extra < 0.25:
        return replace(
            subject,
            accent=other_rgb,
            accent_color=other,
            two_tone=True,
            pattern="plain",
        )
    if extra < 0.42:
        sign = Emblem(str(generator.choice(sdf.EMBLEMS)), other_rgb, other)
        return replace(subject, emblem=sign, pattern="plain")
    return subject


def place(subject: DrawnSubject, background: str, generator: np.random.Generator) -> Scene:
    """Put a subject into a place, with a random view of it."""
    size = generator.uniform(0.55, 0.85)
    room = 1.0 - size
    return Scene(
        subject=subject,
        background=background,
        size=float(size),
        position=(
            float(generator.uniform(-room, room)),
            float(generator.uniform(-room, 0.3 * room)),
        ),
        rotation=float(0.08 * generator.standard_normal()),
        flip=bool(generator.random() < 0.5),
        light=float(generator.uniform(0.7, 2.4)),
        seed=int(generator.integers(2**31)),
    )


def _jitter(color: RGB, generator: np.random.Generator) -> RGB:
    """The same colour to the eye, not to the byte."""
    drawn = np.clip(
        np.array(color) * generator.uniform(0.92, 1.06) + generator.uniform(-0.02, 0.02, 3),
        0,
        1,
    )
    return (float(drawn[0]), float(drawn[1]), float(drawn[2]))


def _scaled(color: RGB, factor: float) -> RGB:
    return (factor * color[0], factor * color[1], factor * color[2])
