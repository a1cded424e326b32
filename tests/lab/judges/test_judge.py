"""Judging: real renders score well, wrong wishes and strangers do not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.lab.judges.judge import judge, judged_pixels, similarity
from dora_diffusion.lab.judges.requests import reference_images
from dora_diffusion.lab.toy.backgrounds import BACKGROUNDS
from dora_diffusion.lab.toy.benchmark_subjects import REPORTED
from dora_diffusion.lab.toy.instrument import Instrument, load_instrument
from dora_diffusion.lab.toy.sampling import place, sample_subject
from dora_diffusion.lab.toy.world import Scene, render


def drawn_scene(index: int) -> Scene:
    generator = np.random.default_rng((12, index))
    background = str(generator.choice(list(BACKGROUNDS)))
    return place(sample_subject(generator), background, generator)


@pytest.fixture(scope="module")
def instrument() -> Instrument:
    return load_instrument()


def test_images_of_any_size_are_judged_at_64() -> None:
    scene = drawn_scene(3)
    large = Image.fromarray(render(scene, (320, 256)))
    small = np.asarray(judged_pixels([Image.fromarray(render(scene, 64))]))
    assert np.abs(np.asarray(judged_pixels([large])) - small).mean() < 0.03
    with pytest.raises(ValueError, match="no images"):
        judged_pixels([])


def test_the_judge_reads_real_renders(instrument: Instrument) -> None:
    scenes = [drawn_scene(i) for i in range(40)]
    seen = judge(instrument, [Image.fromarray(render(scene, 64)) for scene in scenes])
    for name, truth in {
        "kind": [s.subject.kind for s in scenes],
        "color": [s.subject.color for s in scenes],
        "pattern": [s.subject.pattern for s in scenes],
        "background": [s.background for s in scenes],
    }.items():
        assert np.mean([a == t for a, t in zip(seen.answers[name], truth, strict=True)]) >= 0.95
    assert seen.pixels.min() >= 0
    assert seen.pixels.max() <= 1


def test_every_subject_resembles_itself_alone(instrument: Instrument) -> None:
    images = [reference_images(subject, 64, views=2) for subject in REPORTED]
    vectors = [judge(instrument, found).identity for found in images]
    table = np.array([[float(similarity(a, b).mean()) for b in vectors] for a in vectors])
    assert table.diagonal().min() >= 0.9
    assert table[~np.eye(len(REPORTED), dtype=bool)].max() <= 0.5
