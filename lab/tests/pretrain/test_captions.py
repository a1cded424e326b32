"""Captions of the toy world say the truth."""

from __future__ import annotations

import numpy as np

from dora_diffusion.toy.judges import compose, sample_subject
from dora_diffusion.toy.shapes import CLASSES
from dora_diffusion.toy.world import BACKGROUNDS, COLORS, PATTERNS, PLACES, Scene
from lab.pretrain.captions import PATTERN_PHRASES, PATTERN_WORDS, caption


def drawn_scene(index: int) -> Scene:
    generator = np.random.default_rng((12, index))
    background = str(generator.choice(list(BACKGROUNDS)))
    return compose(sample_subject(generator), background, generator)


def test_captions_say_only_what_is_true() -> None:
    generator = np.random.default_rng(0)
    for index in range(400):
        scene = drawn_scene(index)
        subject, text = scene.subject, caption(scene, generator)
        words = set(text.replace(",", "").split())
        colors = {subject.color}
        if subject.two_tone:
            colors.add(subject.accent_color)
        if subject.emblem is not None:
            colors.add(subject.emblem.color)
            words.discard(subject.emblem.kind)  # an emblem may share a class's name
        # "green lawn" and "orange" are the world's only place words that are colours.
        named = {word for word in words & set(COLORS) if f"{word} lawn" not in text}
        assert named <= colors, text
        assert words & set(CLASSES) <= {subject.kind, "tree"}, text
        for pattern in PATTERNS[1:]:
            told = [w for w in PATTERN_WORDS[pattern] if w in text]
            if told or PATTERN_PHRASES[pattern] in text:
                assert subject.pattern == pattern, text
        for background, phrases in PLACES.items():
            if any(text.endswith(phrase) for phrase in phrases):
                assert background == scene.background, text
        if "on the left" in text:
            assert scene.position[0] < 0


def test_a_name_stands_before_the_adjectives() -> None:
    generator = np.random.default_rng(0)
    for index in range(100):
        scene = drawn_scene(index)
        words = caption(scene, generator, "qqz").replace(",", "").split()
        before = words[: words.index("qqz")]
        assert not {scene.subject.kind, scene.subject.color, "striped"} & set(before), words
