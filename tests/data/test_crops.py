"""Crops against plain PIL and torchvision, and the record SDXL conditions on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dora_diffusion.data.crops import (
    CropRecord,
    apply_crop,
    apply_crop_to_mask,
    covering_size,
    plan_crop,
)


def gradient(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1), rows * 0 + 9]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def reference_pixels(image: Image.Image) -> torch.Tensor:
    values = torch.from_numpy(np.asarray(image).astype(np.float64)).permute(2, 0, 1)
    return (values / 255 - 0.5) / 0.5


@pytest.mark.parametrize(("width", "height"), [(100, 60), (60, 100), (64, 64), (20, 31)])
def test_center_crop_equals_pil(width: int, height: int) -> None:
    image = gradient(width, height)
    record = plan_crop((height, width), 32)
    pixels = apply_crop(image, record)
    scale = 32 / min(width, height)
    resized_width, resized_height = round(width * scale), round(height * scale)
    resized = image.resize((resized_width, resized_height), Image.Resampling.LANCZOS)
    left, top = (resized_width - 32) // 2, (resized_height - 32) // 2
    expected = reference_pixels(resized.crop((left, top, left + 32, top + 32)))
    torch.testing.assert_close(pixels.double(), expected, atol=1e-6, rtol=0)
    assert pixels.dtype == torch.float32
    assert record == CropRecord((height, width), (top, left), (32, 32), False)


def test_a_flip_mirrors_before_the_crop() -> None:
    image = gradient(90, 40)
    record = CropRecord((40, 90), (0, 5), (40, 40), flipped=True)
    expected = reference_pixels(image)[:, :, range(89, -1, -1)][:, :, 5:45]
    torch.testing.assert_close(apply_crop(image, record).double(), expected, atol=1e-6, rtol=0)


def test_draws_repeat_with_the_generator_and_cover_the_photo() -> None:
    def draw(seed: int) -> CropRecord:
        generator = torch.Generator().manual_seed(seed)
        return plan_crop((32, 128), 32, generator=generator)

    records = [draw(seed) for seed in range(300)]
    assert records == [draw(seed) for seed in range(300)]
    lefts = [record.crop_top_left[1] for record in records]
    assert min(lefts) <= 3
    assert max(lefts) >= 93
    assert all(record.crop_top_left[0] == 0 for record in records)
    assert not any(record.flipped for record in records)


@pytest.mark.parametrize("resolution", [500, 0, (64, 60), 7])
def test_resolutions_off_the_latent_grid_are_refused(resolution: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be a multiple of 8"):
        plan_crop((600, 600), resolution)


def test_a_mask_follows_its_photo() -> None:
    image = gradient(80, 48)
    record = CropRecord((48, 80), (0, 7), (24, 24), flipped=True)
    mask = apply_crop_to_mask(image.getchannel(0), record)
    torch.testing.assert_close(mask, apply_crop(image, record)[:1] / 2 + 0.5, atol=1e-6, rtol=0)


@given(
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(0, 1000),
)
def test_every_planned_crop_lies_inside(
    original: tuple[int, int], blocks: tuple[int, int], seed: int
) -> None:
    target = (blocks[0] * 8, blocks[1] * 8)
    generator = torch.Generator().manual_seed(seed)
    record = plan_crop(original, target, generator=generator)
    resized = covering_size(original, target)
    for axis in (0, 1):
        assert 0 <= record.crop_top_left[axis] <= resized[axis] - target[axis]
    # No more is resized than covering asks for: one side fits exactly.
    assert resized[0] == target[0] or resized[1] == target[1]
