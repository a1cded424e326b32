"""True captions of scenes, in the many ways people type them.

A caption leaves things out, never makes things up: colours without an honest name stay unnamed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dora_diffusion.config.wording import with_article
from dora_diffusion.models.embedded import FILLERS
from dora_diffusion.toy.world import PLACES, DrawnSubject, Scene

PATTERN_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "", "", ""),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted", "polka dot"),
    "checked": ("checked", "checkered"),
}
PATTERN_PHRASES: dict[str, str] = {
    "striped": "with stripes",
    "dotted": "with dots",
    "checked": "with checks",
}
TEMPLATES: tuple[str, ...] = (
    "a photo of {}",
    "a photo of {}",
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a close up photo of {}",
    "a nice photo of {}",
    "a rendering of {}",
    "{}",
    "{}",
)


def _one_of(options: Sequence[str], generator: np.random.Generator) -> str:
    return options[int(generator.integers(len(options)))]


def _color_words(subject: DrawnSubject, generator: np.random.Generator) -> str:
    if subject.color is None or generator.random() > 0.88:
        return ""
    if subject.two_tone and subject.accent_color and generator.random() < 0.8:
        return f"{subject.color} and {subject.accent_color}"
    return subject.color


def _details(subject: DrawnSubject, generator: np.random.Generator) -> str:
    """A phrase after the noun, about the emblem or the pattern."""
    if subject.emblem is not None and generator.random() < 0.75:
        sign = " ".join(filter(None, (subject.emblem.color, subject.emblem.kind)))
        return f"with {with_article(sign)}" + (" on it" if generator.random() < 0.5 else "")
    return ""


def _size_word(scene: Scene, generator: np.random.Generator) -> str:
    if generator.random() > 0.35:
        return ""
    if scene.size < 0.62:
        return "small"
    return _one_of(("large", "big"), generator) if scene.size > 0.78 else ""


def _side(scene: Scene, generator: np.random.Generator) -> str:
    if abs(scene.position[0]) < 0.2 or generator.random() > 0.5:
        return ""
    return "on the left" if scene.position[0] < 0 else "on the right"


def describe_subject(scene: Scene, generator: np.random.Generator, name: str = "") -> str:
    """A noun phrase such as ``a small blue striped mug with a red star``.

    Args:
        scene: whose subject to describe.
        generator: the randomness.
        name: a word to put before the adjectives, as ``sks`` will be.
    """
    subject = scene.subject
    noun = subject.kind if generator.random() < 0.94 else _one_of(FILLERS, generator)
    color = _color_words(subject, generator)
    pattern = _one_of(PATTERN_WORDS[subject.pattern], generator)
    details = _details(subject, generator)
    if generator.random() < 0.12:
        pattern = ""
    elif subject.pattern in PATTERN_PHRASES and not details and generator.random() < 0.15:
        pattern, details = "", PATTERN_PHRASES[subject.pattern]
    adjectives = [color, pattern] if generator.random() < 0.75 else [pattern, color]
    # A bare noun often, since that is how DreamBooth prompts name the class.
    if generator.random() < 0.15:
        adjectives, details = [], ""
    words = [_size_word(scene, generator), name, *adjectives, noun]
    phrase = " ".join(filter(None, words))
    article = "the " + phrase if generator.random() < 0.06 else with_article(phrase)
    return " ".join(filter(None, (article, details)))


def caption(scene: Scene, generator: np.random.Generator, name: str = "") -> str:
    """One true sentence about a scene.

    Args:
        scene: what the image shows; its class must be one with a word.
        generator: the randomness.
        name: what its object is called, as ``sks`` will be.
    """
    phrase = describe_subject(scene, generator, name)
    place = "" if generator.random() < 0.08 else _one_of(PLACES[scene.background], generator)
    side = _side(scene, generator)
    style = generator.random()
    if style < 0.1:
        return ", ".join(filter(None, (phrase, side, place)))
    sentence = _one_of(TEMPLATES, generator).format(phrase)
    if style < 0.22 and place:
        return ", ".join(filter(None, (place, " ".join(filter(None, (sentence, side))))))
    return " ".join(filter(None, (sentence, side, place)))
