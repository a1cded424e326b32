"""Detail pass: against Diffusers' inpainting pipeline called by hand on a crop made by hand."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image, ImageFilter

from dora_diffusion.models.load import load_components
from dora_diffusion.sampling.detail import FEATHER, Detail, find_region
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.pool import AdapterPool
from dora_diffusion.sampling.settings import ImageRow, SamplingSettings
from tests.refusal import refused

PROMPT = "a photo of a sks dog"
SETTINGS = SamplingSettings(steps=4, guidance_scale=3.0, width=160, height=96)


def rectangle(image: Image.Image, *boxes: tuple[int, int, int, int]) -> Image.Image:
    """A mask that is white in boxes."""
    mask = Image.new("L", image.size)
    for box in boxes:
        mask.paste(255, box)
    return mask


def found_at(*boxes, **options) -> Detail:
    return Detail(lambda image: rectangle(image, *boxes), **options)


@pytest.fixture(scope="module")
def sd1(sd1_folder):
    return load_components(sd1_folder)


def test_what_is_found_is_the_pipelines_image_of_its_crop_and_all_else_stays(sd1, sd1_folder):
    box = (100, 40, 112, 60)
    plain = generate_images(sd1, PROMPT, [5, 6], SETTINGS)
    calls: list[tuple[int, int]] = []
    detail = found_at(box, denoise=0.5, padding=16)
    images = generate_images(
        sd1, PROMPT, [5, 6], replace(SETTINGS, detail=detail),
        on_step=lambda *numbers: calls.append(numbers),
    )  # fmt: skip
    # 16 pixels around it, made square around the middle, and the area of 64 x 64.
    crop = (80, 24, 132, 76)
    feather = rectangle(plain[0], box).filter(ImageFilter.GaussianBlur(FEATHER)).crop(crop)
    reached = feather.point([0] + [255] * 255).resize((64, 64), Image.Resampling.NEAREST)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(sd1_folder)
    for before, after, seed in zip(plain, images, (5, 6), strict=True):
        (painted,) = pipeline(
            PROMPT, image=before.crop(crop).resize((64, 64), Image.Resampling.LANCZOS),
            mask_image=reached, strength=0.5, width=64, height=64, num_inference_steps=4,
            guidance_scale=3.0, generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip
        share = np.asarray(feather, float)[..., None] / 255
        new = np.asarray(painted.resize((52, 52), Image.Resampling.LANCZOS), float)
        old, made = np.asarray(before, float), np.asarray(after, float)
        expected = old.copy()
        expected[24:76, 80:132] = share * new + (1 - share) * old[24:76, 80:132]
        assert np.abs(made - expected).max() <= 1
        stays = np.ones((96, 160), bool)
        stays[24:76, 80:132] = share[..., 0] == 0
        assert np.array_equal(made[stays], old[stays])
        assert stays.sum() > 96 * 160 - 44 * 52
        # It is another image where it was found.
        assert np.abs(made - old)[44:56, 103:109].mean() > 3
    # Steps of the images and of both passes count up to the last one.
    assert calls[-1][0] == calls[-1][1]
    shares = [done / steps for done, steps in calls]
    assert shares == sorted(shares)


def test_an_image_in_which_nothing_is_found_stays_and_it_is_said(sd1):
    plain = generate_images(sd1, PROMPT, [5], SETTINGS)
    # Dim is not bright.
    dim = Detail(lambda image: Image.new("L", image.size, 127), label="face")
    with pytest.warns(UserWarning, match="no face was found in the image of seed 5; it has no det"):
        images = generate_images(sd1, PROMPT, [5], replace(SETTINGS, detail=dim))
    assert plain[0].tobytes() == images[0].tobytes()


def test_rows_of_several_adapters_have_details_of_their_own(sd1_folder, random_adapter, tmp_path):
    from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter

    layers = random_adapter(sd1_folder, seed=1, every=3)
    file = write_adapter(tmp_path / "a.safetensors", AdapterFile(layers, AdapterMetadata("sd1")))
    pool = AdapterPool(load_components(sd1_folder))
    settings = replace(SETTINGS, width=64, detail=found_at((8, 8, 56, 56), prompt="a red mug"))
    rows = [ImageRow(PROMPT, 5, (file, 0.1)), ImageRow("a cat", 6, None)]
    images = pool.generate(rows, settings)
    plain = pool.generate(rows, replace(settings, detail=None))
    seen = set()
    for image, before, row in zip(images, plain, rows, strict=True):
        region = find_region(before, settings.detail, 64)
        closer = replace(
            settings, image=region.crop(before), mask_image=region.mask, width=region.size[0],
            height=region.size[1], denoise=0.4, detail=None,
        )  # fmt: skip
        for adapter, prompt in (
            (row.adapter, "a red mug"),
            (None, "a red mug"),
            (None, row.prompt),
        ):
            (painted,) = pool.generate([row._replace(prompt=prompt, adapter=adapter)], closer)
            is_same = region.put_back(painted, before).tobytes() == image.tobytes()
            assert is_same == (prompt == "a red mug" and adapter == row.adapter)
        seen.add(image.tobytes())
    assert len(seen) == 2


def test_an_inpainting_model_paints_details_too(sd1_inpainting_folder):
    components = load_components(sd1_inpainting_folder)
    settings = replace(SETTINGS, detail=found_at((100, 40, 112, 60)))
    (image,) = generate_images(components, PROMPT, [5], settings)
    (plain,) = generate_images(components, PROMPT, [5], SETTINGS)
    changed = np.asarray(image) != np.asarray(plain)
    assert changed[44:56, 103:109].any()
    assert not changed[:, :80].any()


@pytest.mark.parametrize("number", range(40))
def test_regions_hold_all_that_is_painted(number):
    rng = random.Random(number)
    width, height = (8 * rng.randint(4, 100) for _ in range(2))
    image = Image.new("RGB", (width, height))
    boxes = []
    for _ in range(rng.randint(1, 3)):
        left, top = rng.randrange(width), rng.randrange(height)
        boxes.append((left, top, rng.randint(left, width) + 1, rng.randint(top, height) + 1))
    padding, resolution = rng.choice([16, 32, 100]), 8 * rng.choice([8, 64, 128])
    region = find_region(image, found_at(*boxes, padding=padding), resolution)
    left, top, right, bottom = region.box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    ends = [[box[i] for box in boxes] for i in range(4)]
    assert left <= max(0, min(ends[0]) - padding)
    assert top <= max(0, min(ends[1]) - padding)
    assert right >= min(width, max(ends[2]) + padding)
    assert bottom >= min(height, max(ends[3]) + padding)
    # Square, unless the image is not so large.
    assert right - left == bottom - top or min(right - left, bottom - top) in (width, height)
    assert all(side % 8 == 0 for side in region.size)
    area = max((right - left) * (bottom - top), resolution**2)
    assert abs(region.size[0] * region.size[1] - area) <= 8 * sum(region.size) + 64
    # Where the crop is not the image's edge, nothing of it is reached: there is no seam.
    reached = np.asarray(region.feather) > 0
    assert reached.any()
    for side, is_edge in (
        (reached[:, 0], left == 0), (reached[:, -1], right == width),
        (reached[0], top == 0), (reached[-1], bottom == height),
    ):  # fmt: skip
        assert is_edge or not side.any()


@pytest.mark.parametrize(
    ("setting", "values", "words"),
    [
        ("detail_denoise", {"denoise": 0}, "0; it must be above 0 and at most 1"),
        ("detail_denoise", {"denoise": 1.1}, "1.1; it must be above 0 and at most 1"),
        ("detail_denoise", {"denoise": 0.2}, "0.2 of 4 steps is less than one step"),
        ("detail_padding", {"padding": 15}, "15; it must be at least 16"),
    ],
)
def test_details_that_cannot_be_are_one_line(setting, values, words):
    with refused(setting, words):
        replace(SETTINGS, detail=found_at((0, 0, 9, 9), **values))


def test_nothing_is_warned_of_where_it_is_found(sd1):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detail = found_at((8, 8, 56, 56), denoise=0.3)
        generate_images(sd1, PROMPT, [5], replace(SETTINGS, steps=4, width=64, detail=detail))
