"""Requests to a model in the toy world, and the image that would be a right answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from dora_diffusion.config.wording import with_article
from dora_diffusion.evaluation.measures import ImageRequest
from dora_diffusion.lab.toy.benchmark_subjects import BenchmarkSubject
from dora_diffusion.lab.toy.instrument import STUDIO
from dora_diffusion.lab.toy.shapes import CLASSES, EMBLEMS, RGB
from dora_diffusion.lab.toy.world import (
    BACKGROUNDS,
    COLORS,
    PATTERNS,
    PLACES,
    DrawnSubject,
    Emblem,
    Scene,
    render,
)

if TYPE_CHECKING:
    from PIL.Image import Image


Group = Literal["subject", "pose", "class", "others"]
GROUPS: tuple[Group, ...] = ("subject", "pose", "class", "others")
SMALL, LARGE, ASIDE = 0.58, 0.82, 0.34
"""Sizes and the distance from the middle that the words of the captions mean."""

_TRUTH = 1000
_REFERENCES = 2000


@dataclass(frozen=True)
class ToyRequest(ImageRequest):
    """An image of the subject on a held-out background or in a pose, its class, or another class.

    Attributes:
        scene: A right answer.
        wanted: Attribute -> value that the prompt asks for.
        pose: The word for side or size, of the group ``"pose"``.
    """

    scene: Scene
    wanted: Mapping[str, str] = field(default_factory=dict)
    pose: str = ""


def toy_requests(
    subject: BenchmarkSubject,
    trigger: str,
    seeds: Sequence[int],
    groups: Sequence[Group] = GROUPS,
) -> list[ToyRequest]:
    """Return each seed's requests: the subject on held-out backgrounds, poses, class, others.

    Args:
        subject: The subject.
        trigger: Trigger words, such as "sks mug".
        seeds: One round of prompts each.
        groups: What to ask for.
    """
    makers = {
        "subject": lambda seed: _subject(subject, trigger, seed),
        "pose": lambda seed: _poses(subject, trigger, seed),
        "class": lambda seed: _own_class(subject, seed),
        "others": lambda seed: _others(subject, seed),
    }
    return [
        replace(request, round=number, seed=1000 * seed + 100 * GROUPS.index(group) + k)
        for number, seed in enumerate(seeds)
        for group in groups
        for k, request in enumerate(makers[group](seed))
    ]


def _photo_of(phrase: str, *details: str) -> str:
    return " ".join(["a photo of", with_article(phrase), *details])


def _subject(subject: BenchmarkSubject, trigger: str, seed: int) -> list[ToyRequest]:
    return [
        ToyRequest(
            "subject",
            _photo_of(trigger, PLACES[background][0]),
            0,
            0,
            subject.sample.scene(background, _TRUTH + seed),
            {"background": background},
        )
        for background in subject.held_out_backgrounds
    ]


def _poses(subject: BenchmarkSubject, trigger: str, seed: int) -> list[ToyRequest]:
    view = subject.sample.scene(STUDIO, _TRUTH + seed)
    where = PLACES[STUDIO][0]
    plans = {
        "left": (_photo_of(trigger, "on the left", where), 0.62, -ASIDE),
        "right": (_photo_of(trigger, "on the right", where), 0.62, ASIDE),
        "small": (_photo_of(f"small {trigger}", where), SMALL, 0.0),
        "large": (_photo_of(f"large {trigger}", where), LARGE, 0.0),
    }
    return [
        ToyRequest("pose", prompt, 0, 0, replace(view, size=size, position=(x, -0.1)), {}, pose)
        for pose, (prompt, size, x) in plans.items()
    ]


def _own_class(subject: BenchmarkSubject, seed: int) -> list[ToyRequest]:
    word, generator = subject.word, np.random.default_rng((seed, 3))
    kind = subject.sample.subject.kind if subject.known_class else None
    return [
        ToyRequest(
            "class",
            _photo_of(word, PLACES[background][0]),
            0,
            0,
            place(sample_subject(generator, kind), background, generator),
            {"background": background} | ({"kind": kind} if kind else {}),
        )
        for background in subject.held_out_backgrounds
    ]


def _others(subject: BenchmarkSubject, seed: int) -> list[ToyRequest]:
    """Every other class once, every second time in a colour; places and colours take turns."""
    generator = np.random.default_rng((seed, 4))
    own_kind = subject.sample.subject.kind
    requests = []
    for number, kind in enumerate(name for name in CLASSES if name != own_kind):
        background = list(BACKGROUNDS)[(3 * number + seed) % len(BACKGROUNDS)]
        drawn, color = sample_subject(generator, kind), ""
        if (number + seed) % 2:
            color = list(COLORS)[(7 * number + seed) % len(COLORS)]
            shade = _scaled(COLORS[color], 0.72)
            drawn = DrawnSubject(kind, COLORS[color], shade, color=color, accent_color=color)
        wanted = {"kind": kind, "background": background} | ({"color": color} if color else {})
        prompt = _photo_of(f"{color} {kind}".strip(), PLACES[background][0])
        scene = place(drawn, background, generator)
        requests.append(ToyRequest("others", prompt, 0, 0, scene, wanted))
    return requests


def true_images(requests: Sequence[ToyRequest], size: int) -> list[Image]:
    """The right answers at a size."""
    from PIL import Image

    return [Image.fromarray(render(request.scene, size)) for request in requests]


def reference_images(subject: BenchmarkSubject, size: int, views: int = 4) -> list[Image]:
    """True images of the subject on held-out backgrounds, in views that no request has."""
    from PIL import Image

    return [
        Image.fromarray(render(subject.sample.scene(background, _REFERENCES + view), size))
        for background in subject.held_out_backgrounds
        for view in range(views)
    ]


def sample_subject(generator: np.random.Generator, kind: str | None = None) -> DrawnSubject:
    """Draw an ordinary object: palette colours, at times two-tone or with an emblem."""
    kind = kind or str(generator.choice(list(CLASSES)))
    color = str(generator.choice(list(COLORS)))
    body = _jitter(COLORS[color], generator)
    # Patterns are near-white on dark colours, near-black on light ones.
    is_light = 0.3 * body[0] + 0.59 * body[1] + 0.11 * body[2] > 0.68
    subject = DrawnSubject(
        kind=kind,
        body=body,
        accent=_scaled(body, 0.72),
        pattern=PATTERNS[generator.choice(4, p=(0.46, 0.2, 0.2, 0.14))],
        pattern_rgb=(0.12, 0.12, 0.14) if is_light else (0.95, 0.95, 0.94),
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
        drawn = replace(subject, two_tone=True, pattern="plain")
        return replace(drawn, accent=other_rgb, accent_color=other)
    if extra < 0.42:
        sign = Emblem(str(generator.choice(list(EMBLEMS))), other_rgb, other)
        return replace(subject, emblem=sign, pattern="plain")
    return subject


def place(subject: DrawnSubject, background: str, generator: np.random.Generator) -> Scene:
    """Place a subject, with a random view of it."""
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
    drawn = np.array(color) * generator.uniform(0.92, 1.06) + generator.uniform(-0.02, 0.02, 3)
    red, green, blue = np.clip(drawn, 0, 1).tolist()
    return (red, green, blue)


def _scaled(color: RGB, factor: float) -> RGB:
    return (factor * color[0], factor * color[1], factor * color[2])
