"""Images over and into others: those of Diffusers' pipelines called by hand."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
from dora_diffusion.config import AdapterConfig
from dora_diffusion.models.load import load_components
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.settings import SamplingSettings
from tests.refusal import refused

PROMPT, NEGATIVE = "a photo of a sks dog", "a blurry cat"
SETTINGS = SamplingSettings(5, 4.0, negative_prompt=NEGATIVE)
PIPELINES = {
    ("sd1", "image"): diffusers.StableDiffusionImg2ImgPipeline,
    ("sd1", "mask"): diffusers.StableDiffusionInpaintPipeline,
    ("sdxl", "image"): diffusers.StableDiffusionXLImg2ImgPipeline,
    ("sdxl", "mask"): diffusers.StableDiffusionXLInpaintPipeline,
}


@pytest.fixture(params=["sd1", "sdxl"])
def family(request):
    return request.param


@pytest.fixture
def folder(family, request):
    return request.getfixturevalue(f"{family}_folder")


def photo(width=64, height=64, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)


def mask(width=64, height=64):
    image = Image.new("L", (width, height))
    image.paste(255, (8, 16, 40, 56))
    return image


def difference(first, second):
    return np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16)).max()


@pytest.fixture(scope="module")
def loaded():
    """Components of a folder, and the parts of Diffusers' own pipeline of it, read once."""

    @functools.cache
    def read(folder):
        stock = diffusers.DiffusionPipeline.from_pretrained(folder)
        return load_components(folder), stock.components

    return read


def by_hand(parts, family, task, seed, **options):
    """The image of Diffusers' own pipeline, loaded from the folder."""
    extra = {"add_watermarker": False} if family == "sdxl" else {"requires_safety_checker": False}
    names = inspect.signature(PIPELINES[family, task]).parameters
    own = {name: part for name, part in parts.items() if name in names}
    pipeline = PIPELINES[family, task](**own, **extra)
    pipeline.set_progress_bar_config(disable=True)
    if family == "sdxl":
        # As `generate_images` decodes: at the autoencoder's own precision.
        pipeline.vae.register_to_config(force_upcast=False)
    (image,) = pipeline(
        PROMPT, negative_prompt=NEGATIVE, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(seed), **options,
    ).images  # fmt: skip
    return image


@pytest.mark.parametrize("denoise", [None, 0.2, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_images_are_those_of_the_pipelines_called_by_hand(masked, denoise, family, folder, loaded):
    settings = replace(SETTINGS, image=photo(), denoise=denoise)
    options = {"image": photo(), "strength": 0.75 if denoise is None else denoise}
    if masked:
        settings = replace(settings, mask_image=mask())
        options |= {"mask_image": mask(), "width": 64, "height": 64}
    components, parts = loaded(folder)
    first, second = generate_images(components, PROMPT, [5, 6], settings, batch_size=1)
    task = "mask" if masked else "image"
    expected = by_hand(parts, family, task, 5, num_inference_steps=5, **options)
    assert difference(first, expected) == 0
    # Each seed gives its image in a batch too.
    together = generate_images(components, PROMPT, [5, 6], settings)
    assert max(map(difference, together, (first, second))) <= 1
    if denoise != 0.2 or not masked:
        assert difference(first, second) > 1


@pytest.mark.parametrize("name", ["embedded:tiny-sd", "embedded:tiny-sdxl"])
def test_latents_of_any_channels_are_painted_into(name):
    """Under a white mask it is image to image; where the mask is black, the image stays."""
    components = load_components(name)
    channels = components.denoiser.config.in_channels
    assert channels != 4
    side = components.default_resolution
    settings = replace(SETTINGS, image=photo(side, side), denoise=0.6, width=side, height=side)
    white, half = Image.new("L", (side, side), 255), Image.new("L", (side, side))
    half.paste(255, (0, 0, side // 2, side))
    (over,) = generate_images(components, PROMPT, [5], settings)
    (all_of_it,) = generate_images(components, PROMPT, [5], replace(settings, mask_image=white))
    assert difference(over, all_of_it) <= 1
    (partly,) = generate_images(components, PROMPT, [5], replace(settings, mask_image=half))
    assert components.denoiser.config.in_channels == channels
    pixels = torch.from_numpy(np.asarray(photo(side, side), np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        latents = components.vae.encode(pixels / 127.5 - 1).latent_dist.mode()
        kept = components.vae.decode(latents).sample[0].permute(1, 2, 0).add(1).mul(127.5)
    right = slice(3 * side // 4, None)
    away = [
        np.abs(np.asarray(image, np.float32) - kept.clamp(0, 255).numpy())[:, right].mean()
        for image in (partly, over)
    ]
    assert away[0] < 0.2 * away[1]


def test_what_is_painted_over_is_cut_from_the_middle(sd1_folder, loaded):
    components, _ = loaded(sd1_folder)
    for extra, wide in (({}, {}), ({"mask_image": mask()}, {"mask_image": mask(96)})):
        cut = {"image": photo(96).crop((16, 0, 80, 64)), **extra}
        if extra:
            cut["mask_image"] = mask(96).crop((16, 0, 80, 64))
        images = [
            generate_images(components, PROMPT, [1], replace(SETTINGS, **given))[0]
            for given in (cut, {"image": photo(96), **wide})
        ]
        assert difference(*images) == 0


def test_rows_of_several_adapters_are_painted_too(sd1_folder):
    components = load_components(sd1_folder)
    for number, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(number)
        config = AdapterConfig(targets=("attention",), rank=2)
        inject_adapters(components.denoiser, config, name=name, generator=generator)
        with torch.no_grad():
            for parameter in adapter_parameters(components.denoiser, name):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    settings = replace(SETTINGS, image=photo())
    mixed = generate_images(components, PROMPT, [5, 5, 5], settings, adapters=["a", None, "b"])
    for image, name in zip(mixed, ("a", None, "b"), strict=True):
        (alone,) = generate_images(components, PROMPT, [5], settings, adapters=[name])
        assert difference(image, alone) <= 1
    assert difference(mixed[0], mixed[1]) > 1


def test_an_autoencoder_that_overflows_stays_in_float32(sdxl_folder):
    components = load_components(sdxl_folder, dtype=torch.bfloat16)
    for changes in ({"image": photo()}, {"image": photo(), "mask_image": mask()}):
        settings = replace(SETTINGS, **changes)
        (image,) = generate_images(components, PROMPT, [1], settings, require_finite=True)
        assert components.vae.dtype == torch.float32
        assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("setting", "changes", "words"),
    [
        ("denoise", {"image": photo(), "denoise": 1.5}, "1.5; it must be at most 1"),
        ("denoise", {"image": photo(), "denoise": 0.1}, "0.1 of 5 steps is less than one step"),
        ("denoise", {"image": photo(), "denoise": float("nan")}, "nan"),
        ("mask_image", {"mask_image": mask()}, "an image of its size"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_paintings_that_cannot_be_are_one_line(setting, changes, words):
    with refused(setting, words):
        replace(SETTINGS, **changes)


def test_guidance_rescale_is_refused_where_a_pipeline_has_none(sd1_folder):
    settings = replace(SETTINGS, image=photo(), guidance_rescale=0.5)
    with refused("guidance_rescale", "is not in Diffusers' pipeline of"):
        generate_images(load_components(sd1_folder), PROMPT, [1], settings)
