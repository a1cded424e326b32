"""Sample and benchmark subjects: objects that the embedded models have not seen.

Benchmark subjects are drawn with fixed seeds.

A subject has a shape, three distinct colours, and an emblem or a pattern. Benchmarks report figures
on reported subjects, and choose settings on tuning subjects, which share no class with them. The
photos of each subject show another five backgrounds; the others are held out. Photos and true
images are never mirrored, which would change emblems such as a lightning bolt or a moon.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dora_diffusion.data.photos import mask_path
from dora_diffusion.toy.shapes import CLASSES, EMBLEMS, RGB, WORLD, find_shape
from dora_diffusion.toy.world import (
    BACKGROUNDS,
    COLORS,
    PATTERNS,
    PLACES,
    DrawnSubject,
    Emblem,
    Pattern,
    Scene,
    render,
    render_mask,
)

TRIGGER = "sks"
SAMPLE_BACKGROUNDS = ("grass", "sand", "wood", "studio", "forest")
PHOTOS = 5
PHOTO_SIZE = 256
NO_WORD = "toy"
"""Class word of shapes without a word in the models' vocabulary."""

_APART = 0.45
_SEED = 29


@dataclass(frozen=True)
class SampleSubject:
    """A subject with the name of its folder and its class word in prompts."""

    name: str
    class_word: str
    subject: DrawnSubject

    def prompt(self, background: str, variant: int = 0) -> str:
        """``a photo of a sks mug on the grass``."""
        phrase = PLACES[background][variant]
        return f"a photo of a {TRIGGER} {self.class_word} {phrase}"

    def scene(self, background: str, seed: int) -> Scene:
        """Draw a view of the subject, never mirrored, which would change emblems."""
        generator = np.random.default_rng((zlib.crc32(self.name.encode()), seed))
        return Scene(
            subject=self.subject,
            background=background,
            size=float(generator.uniform(0.64, 0.82)),
            position=(float(generator.uniform(-0.16, 0.16)), float(generator.uniform(-0.2, 0))),
            rotation=float(generator.uniform(-0.1, 0.1)),
            light=float(generator.uniform(0.9, 2.2)),
            seed=seed,
        )


@dataclass(frozen=True)
class BenchmarkSubject:
    """Subject with the backgrounds of its photos.

    Attributes:
        sample: The subject with its name, prompts and views.
        photo_backgrounds: Backgrounds of its photos.
        known_class: Whether the models have a word for its class.
    """

    sample: SampleSubject
    photo_backgrounds: tuple[str, ...]
    known_class: bool

    @property
    def name(self) -> str:
        """Name on the command line and in reports."""
        return self.sample.name

    @property
    def word(self) -> str:
        return self.sample.class_word

    @property
    def held_out_backgrounds(self) -> tuple[str, ...]:
        """Backgrounds without a photo."""
        return tuple(name for name in BACKGROUNDS if name not in self.photo_backgrounds)


def draw_subject(
    kind: str,
    seed: int,
    *,
    mark: str,
    color: str | None = None,
    word: str | None = None,
    photos: int = PHOTOS,
) -> BenchmarkSubject:
    """Draw a subject; the same seed gives the same subject on all machines.

    Args:
        kind: A class name of `shapes`, or ``random-<number>`` for a nonsense shape.
        seed: Seed of colours, backgrounds and views.
        mark: Emblem or pattern on its body.
        color: Palette name of the body; None draws a colour without a name.
        word: Class word; None: the models have none.
        photos: Number of photos, at most five; fewer are the first ones.

    Raises:
        ValueError: If the class, emblem, pattern, colour or number of photos is not valid.
    """
    if not 1 <= photos <= PHOTOS:
        raise ValueError(f"photos is {photos}; it must be from 1 to {PHOTOS}")
    find_shape(kind)  # Raises an error for unknown classes.
    for category, name, known in (
        ("colour", color, (*COLORS, None)),
        ("emblem or pattern", mark, (*EMBLEMS, *PATTERNS)),
    ):
        if name not in known:
            raise ValueError(f"no {category} {name!r}; there are {', '.join(filter(None, known))}")
    generator = np.random.default_rng((_SEED, seed))
    first = _any_rgb(generator) if color is None else COLORS[color]
    body, accent, sign = _apart(first, generator)
    is_pattern = mark in PATTERNS
    pattern: Pattern = mark if is_pattern else "plain"  # type: ignore[assignment]
    subject = DrawnSubject(
        kind=kind,
        body=body,
        accent=accent,
        pattern=pattern,
        pattern_rgb=sign,
        pattern_angle=float(generator.choice((0.0, 0.8))),
        emblem=None if is_pattern else Emblem(mark, sign),
        color=color,
    )
    backgrounds = generator.choice(list(BACKGROUNDS), PHOTOS, replace=False)
    name = f"{mark}_{'nonsense' if kind.startswith('random-') else kind}"
    name += f"_{photos}" if photos < PHOTOS else ""
    return BenchmarkSubject(
        SampleSubject(name, word or NO_WORD, subject),
        tuple(str(background) for background in backgrounds[:photos]),
        word is not None,
    )


def _any_rgb(generator: np.random.Generator) -> RGB:
    """Draw a colour far from the palette, without a word in captions."""
    while True:
        drawn = generator.uniform(0.05, 0.97, 3)
        if min(_distance(drawn, known) for known in COLORS.values()) > 0.5 * _APART:
            return (float(drawn[0]), float(drawn[1]), float(drawn[2]))


def _apart(first: RGB, generator: np.random.Generator) -> tuple[RGB, RGB, RGB]:
    """Draw two more colours, so that all three are distinct in a small image."""
    while True:
        second, third = _any_rgb(generator), _any_rgb(generator)
        pairs = ((first, second), (first, third), (second, third))
        if min(_distance(a, b) for a, b in pairs) > _APART:
            return first, second, third


def _distance(a: RGB | np.ndarray, b: RGB) -> float:
    return float(np.linalg.norm(np.subtract(a, b)))


def _sample(name: str, word: str, look: list[Any]) -> SampleSubject:
    kind, body, accent, sign, sign_rgb = look
    emblem = Emblem(sign, tuple(sign_rgb))
    return SampleSubject(name, word, DrawnSubject(kind, tuple(body), tuple(accent), emblem=emblem))


REPORTED = tuple(draw_subject(**drawn) for drawn in WORLD["reported"])
TUNING = tuple(draw_subject(**drawn) for drawn in WORLD["tuning"])
SAMPLE_SUBJECTS = {name: _sample(name, **facts) for name, facts in WORLD["samples"].items()}
SAMPLES = tuple(
    BenchmarkSubject(sample, SAMPLE_BACKGROUNDS, sample.class_word in CLASSES)
    for sample in SAMPLE_SUBJECTS.values()
)
SUBJECTS: dict[str, BenchmarkSubject] = {s.name: s for s in (*REPORTED, *TUNING, *SAMPLES)}


def find_subject(name: str) -> BenchmarkSubject:
    """Find a reported, tuning or sample subject by name.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in SUBJECTS:
        raise ValueError(f"no subject {name!r}; there are {', '.join(SUBJECTS)}")
    return SUBJECTS[name]


def write_photos(
    subject: BenchmarkSubject, folder: Path, *, with_masks: bool = False
) -> list[Path]:
    """Render a subject's photos with caption files; returns the photos.

    Args:
        subject: The subject.
        folder: Folder of the photos.
        with_masks: Also write mask files of the subject.
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    photos = []
    for number, background in enumerate(subject.photo_backgrounds, start=1):
        photo = folder / f"{number:02d}.png"
        scene = subject.sample.scene(background, number)
        Image.fromarray(render(scene, PHOTO_SIZE)).save(photo)
        if with_masks:
            Image.fromarray(render_mask(scene, PHOTO_SIZE)).save(mask_path(photo))
        caption = subject.sample.prompt(background) + "\n"
        photo.with_suffix(".txt").write_text(caption, encoding="utf-8")
        photos.append(photo)
    return photos
