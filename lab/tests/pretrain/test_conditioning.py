"""Effect on tiny-sdxl of the sizes and crops that it is told, and how that is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lab.pretrain.card import generate
from lab.pretrain.conditioning import mean_center, sharpness
from lab.pretrain.data import to_pixels
from lab.pretrain.views import SIDE


def images(pipeline: Any, count: int, **conditioning: tuple[int, int]) -> torch.Tensor:
    """Red mugs in the studio, (count, 3, SIDE, SIDE) in [-1, 1]."""
    prompts = ["a red mug in a studio"] * count
    images = generate(pipeline, prompts, target_size=(SIDE, SIDE), **conditioning)
    return to_pixels(np.stack([np.asarray(image) for image in images]))


@pytest.mark.slow
def test_it_looks_at_its_sizes(tiny_sdxl: Any) -> None:
    small, large = (
        images(tiny_sdxl, 4, original_size=(side, side), crops_coords_top_left=(0, 0))
        for side in (SIDE // 4, SIDE)
    )
    assert sharpness(small) < 0.95 * sharpness(large)


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True])
def test_it_looks_at_its_crops(tiny_sdxl: Any, wide: bool) -> None:
    """The middle of a tall photo is further up in its lower part; a wide one alike."""
    size = (SIDE, 3 * SIDE // 2) if wide else (3 * SIDE // 2, SIDE)
    first, last = (
        images(
            tiny_sdxl,
            4,
            original_size=size,
            crops_coords_top_left=(0, offset) if wide else (offset, 0),
        )
        for offset in (0, SIDE // 2)
    )
    if not wide:
        first, last = first.mT, last.mT
    assert mean_center(last) < mean_center(first) - 0.4


def test_center_and_sharpness_are_what_they_say() -> None:
    image = np.full((1, 64, 128, 3), 128, np.uint8)
    image[:, 20:40, 96:112] = (255, 0, 0)
    # Pixels 96 to 111 of 128 have their middle at 0.63 of the way from -1 to 1.
    assert mean_center(to_pixels(image)) == pytest.approx(2 * 103.5 / 127 - 1, abs=0.01)
    stripes = np.zeros((1, 4, 4, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert sharpness(to_pixels(stripes)) == pytest.approx(127.5, abs=0.01)
