"""The shipped SDXL: diffusers' own classes, two encoders, and conditioning that does something."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dora_diffusion.embedded import model_folder
from dora_diffusion.embedded.instrument import load_instrument
from dora_diffusion.embedded.pretrain.card import (
    for_judges,
    generate,
    measure_prompts,
    measure_vae,
)
from dora_diffusion.embedded.pretrain.conditioning import mean_center, sharpness
from dora_diffusion.embedded.pretrain.data import to_pixels
from dora_diffusion.embedded.pretrain.views import SIDE


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(
        model_folder("tiny-sdxl"), local_files_only=True
    )


def test_everything_that_ships_is_within_its_budget() -> None:
    files = [f for f in model_folder("tiny-sd").parent.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files if "__pycache__" not in f.parts) < 40e6
    suffixes = {f.suffix for f in model_folder("tiny-sdxl").rglob("*") if f.is_file()}
    assert suffixes <= {".safetensors", ".json", ".txt", ".md", ".jpg"}


def test_the_weights_are_float16() -> None:
    from safetensors import safe_open

    files = list(model_folder("tiny-sdxl").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        with safe_open(file, "pt") as weights:
            assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float16}  # noqa: SIM118


def test_it_is_sdxl_of_diffusers_own_classes(pipeline: Any) -> None:
    kinds = {name: type(part).__name__ for name, part in pipeline.components.items()}
    assert kinds["unet"] == "UNet2DConditionModel"
    assert kinds["text_encoder"] == "CLIPTextModel"
    assert kinds["text_encoder_2"] == "CLIPTextModelWithProjection"
    assert kinds["tokenizer"] == kinds["tokenizer_2"] == "CLIPTokenizer"
    assert pipeline.unet.config.addition_embed_type == "text_time"
    widths = [part.config.hidden_size for part in (pipeline.text_encoder, pipeline.text_encoder_2)]
    assert widths[0] != widths[1]
    assert pipeline.unet.config.cross_attention_dim == sum(widths)
    assert pipeline.default_sample_size * pipeline.vae_scale_factor == SIDE


def test_it_draws_what_prompts_say(pipeline: Any) -> None:
    accuracy = measure_prompts(pipeline, load_instrument(), 12)
    assert accuracy["kind"] >= 0.8
    assert accuracy["color"] >= 0.8
    assert accuracy["background"] >= 0.8


def test_the_autoencoder_keeps_new_subjects_themselves(pipeline: Any) -> None:
    measured = measure_vae(pipeline.vae, load_instrument(), 20)
    assert measured["psnr"] >= 36
    assert measured["identity"] >= 0.95 * measured["identity_ceiling"]


def pictures(pipeline: Any, count: int, **conditioning: tuple[int, int]) -> torch.Tensor:
    """Red mugs in the studio, (count, 3, SIDE, SIDE) in [-1, 1]."""
    prompts = ["a red mug in a studio"] * count
    images = generate(pipeline, prompts, target_size=(SIDE, SIDE), **conditioning)
    return to_pixels(np.stack([np.asarray(image) for image in images]))


def test_it_looks_at_its_sizes(pipeline: Any) -> None:
    small, large = (
        pictures(pipeline, 4, original_size=(side, side), crops_coords_top_left=(0, 0))
        for side in (SIDE // 4, SIDE)
    )
    assert sharpness(small) < 0.95 * sharpness(large)


@pytest.mark.parametrize("wide", [False, True])
def test_it_looks_at_its_crops(pipeline: Any, wide: bool) -> None:
    """What a tall photo has in its middle, its lower part has further up; a wide one alike."""
    size = (SIDE, 3 * SIDE // 2) if wide else (3 * SIDE // 2, SIDE)
    first, last = (
        pictures(
            pipeline,
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
    picture = np.full((1, 64, 128, 3), 128, np.uint8)
    picture[:, 20:40, 96:112] = (255, 0, 0)
    # Pixels 96 to 111 of 128 have their middle at 0.63 of the way from -1 to 1.
    assert mean_center(to_pixels(picture)) == pytest.approx(2 * 103.5 / 127 - 1, abs=0.01)
    stripes = np.zeros((1, 4, 4, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert sharpness(to_pixels(stripes)) == pytest.approx(127.5, abs=0.01)


def test_the_judges_see_means_of_blocks() -> None:
    pixels = torch.rand(1, 3, 128, 128)
    blocks = pixels.view(1, 3, 64, 2, 64, 2).mean((3, 5))
    torch.testing.assert_close(for_judges(pixels), blocks)
