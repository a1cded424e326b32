"""Subjects of random colours, which the embedded models learn to tell apart by a name."""

from __future__ import annotations

import numpy as np

from dora_diffusion.toy.shapes import CLASSES, EMBLEMS, RGB
from dora_diffusion.toy.world import PATTERNS, DrawnSubject, Emblem


def sample_stranger(generator: np.random.Generator, kind: str | None = None) -> DrawnSubject:
    """Draw an object of random colours, the kind of subject that personalization meets.

    Args:
        generator: the randomness.
        kind: its class; None draws one that has a word, "random" a nonsense shape.
    """
    kind = kind or str(generator.choice(list(CLASSES)))
    if kind == "random":
        kind = f"random-{generator.integers(2**31)}"
    emblem = None
    if generator.random() < 0.5:
        emblem = Emblem(str(generator.choice(list(EMBLEMS))), _any_rgb(generator))
    return DrawnSubject(
        kind=kind,
        body=_any_rgb(generator),
        accent=_any_rgb(generator),
        pattern=PATTERNS[generator.choice(4, p=(0.52, 0.18, 0.18, 0.12))],
        pattern_rgb=_any_rgb(generator),
        pattern_angle=float(generator.uniform(0, np.pi)),
        emblem=emblem,
        two_tone=bool(generator.random() < 0.2),
    )


def _any_rgb(generator: np.random.Generator) -> RGB:
    drawn = generator.uniform(0.04, 0.98, 3)
    return (float(drawn[0]), float(drawn[1]), float(drawn[2]))
