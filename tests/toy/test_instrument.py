"""Finding an object in a studio image: against rectangles, and against where renders put it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dora_diffusion.toy.benchmark_subjects import REPORTED
from dora_diffusion.toy.instrument import Silhouette, follows, middle_size, silhouette
from dora_diffusion.toy.world import render


def test_a_rectangle_on_grey_is_found() -> None:
    pixels = torch.full((3, 40, 40), 0.6)
    assert silhouette(pixels) is None
    pixels[0, 10:30, 20:40] = 1.0
    found = silhouette(pixels)
    assert found is not None
    assert found.size == pytest.approx((20 * 20 / 1600) ** 0.5)
    assert found.center == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("subject", REPORTED, ids=lambda s: s.name)
def test_renders_are_seen_where_and_as_large_as_they_are(subject) -> None:
    view = subject.sample.scene("studio", 5)
    for x in (-0.3, 0.0, 0.3):
        sizes = []
        for size in (0.58, 0.82):
            image = render(replace(view, size=size, position=(x, -0.1)), 64)
            found = silhouette(torch.from_numpy(image).permute(2, 0, 1) / 255)
            assert found is not None
            assert found.center == pytest.approx(x, abs=0.25)
            sizes.append(found.size)
        assert 1.15 < sizes[1] / sizes[0] < 1.55


def test_words_are_followed() -> None:
    shape = Silhouette(center=-0.2, size=0.4)
    assert follows("left", shape, 0.5)
    assert not follows("right", shape, 0.5)
    assert follows("small", shape, 0.5)
    assert not follows("large", shape, 0.5)
    assert not follows("left", None, 0.5)
    shapes = {"small": [Silhouette(0, 0.3), None], "large": [Silhouette(0, 0.5)]}
    assert middle_size(shapes) == pytest.approx(0.4)
    assert middle_size({"small": [None], "large": [Silhouette(0, 0.5)]}) is None
