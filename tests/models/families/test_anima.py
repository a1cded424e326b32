"""Anima against Diffusers' own pipeline and classes, on a tiny random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.anima.before_denoise import AnimaTextConditioningStep
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep, encode_vae_image
from PIL import Image

from dora_diffusion.config import ConfigError
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import encode_moments, latents_from_moments
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts, truncated_text
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.settings import SamplingSettings
from tests.anima import diffusers_pipeline, write_anima

PROMPTS = ["a photo of sks mug", "", "1girl, red hair"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_anima(tmp_path_factory.mktemp("anima") / "model")


@pytest.fixture(scope="module")
def components(folder: Path) -> Components:
    return load_components(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return diffusers_pipeline(folder)


def difference(images: Any, others: Any) -> int:
    pairs = zip(images, others, strict=True)
    return max(int(np.abs(np.subtract(*(np.asarray(i, np.int16) for i in p))).max()) for p in pairs)


def states_of(pipeline: Any, prompts: list[str]) -> torch.Tensor:
    inputs = AnimaTextEncoderStep.encode_prompt(pipeline, prompts)
    names = ("qwen_prompt_embeds", "qwen_attention_mask", "t5_input_ids", "t5_attention_mask")
    states: torch.Tensor = AnimaTextConditioningStep._condition_prompt_embeds(
        pipeline, *(inputs[name] for name in names), torch.device("cpu"), *[torch.float32] * 2
    )
    return states


@torch.no_grad()
@pytest.mark.parametrize("prompts", [PROMPTS, [""], PROMPTS[:1]])
def test_prompts_are_encoded_as_in_the_pipeline(
    components: Components, pipeline: Any, prompts: list[str]
) -> None:
    encoded = encode_prompts(components, prompts)
    assert encoded.encoder_hidden_states.shape == (len(prompts), 512, 16)
    wanted = states_of(pipeline, prompts)
    torch.testing.assert_close(encoded.encoder_hidden_states, wanted, rtol=0, atol=1e-6)
    for number, prompt in enumerate(prompts):
        alone = encode_prompts(components, [prompt]).encoder_hidden_states[0]
        torch.testing.assert_close(encoded.encoder_hidden_states[number], alone, rtol=0, atol=2e-6)


def test_the_end_of_a_long_prompt_is_named(components: Components) -> None:
    """Characters are tokens of both; T5's has a space before, and an end."""
    text = "x" * 509 + " end"
    assert truncated_text(components, text) == "nd"
    assert truncated_text(components, "x" * 510) == ""


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 48), (80, 64)])
def test_latents_are_those_of_the_pipeline(
    components: Components, pipeline: Any, size: tuple[int, int]
) -> None:
    pixels = torch.rand(2, 3, *size) * 2 - 1
    latents = latents_from_moments(components.vae, encode_moments(components.vae, pixels))
    wanted = encode_vae_image(
        pixels, pipeline.vae, torch.Generator(), torch.device("cpu"), torch.float32, 4
    )
    assert latents.shape == (2, 4, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(latents, wanted.squeeze(2), rtol=0, atol=1e-6)
    decoded = components.vae.decode(latents, return_dict=False)[0]
    assert torch.equal(decoded, pipeline.vae.decode(wanted).sample.squeeze(2))


@torch.no_grad()
def test_predictions_are_those_of_the_transformer(components: Components, pipeline: Any) -> None:
    noisy, timesteps = torch.randn(2, 4, 8, 6), torch.tensor([100, 899])
    predicted = components.predict(noisy, timesteps, encode_prompts(components, PROMPTS[:2]))
    shares = (timesteps + 1) / 1000
    (wanted,) = pipeline.transformer(
        noisy.unsqueeze(2), 3 * shares / (1 + 2 * shares), states_of(pipeline, PROMPTS[:2]),
        padding_mask=torch.zeros(1, 1, 64, 48), return_dict=False,
    )  # fmt: skip
    torch.testing.assert_close(predicted, wanted.squeeze(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("negative", ["", "a dog"])
def test_an_image_is_that_of_the_pipeline(
    components: Components, pipeline: Any, scale: float, negative: str
) -> None:
    steps = []
    settings = SamplingSettings(
        steps=3, guidance_scale=scale, negative_prompt=negative, width=64, height=80
    )
    ours = generate_images(
        components, PROMPTS[0], [5, 7], settings, on_step=lambda *done: steps.append(done)
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    pipeline.guider.guidance_scale = scale
    wanted = [
        pipeline(
            prompt=PROMPTS[0], negative_prompt=negative, width=64, height=80, output="images",
            num_inference_steps=3, generator=torch.Generator().manual_seed(seed),
        )[0] for seed in (5, 7)
    ]  # fmt: skip
    assert difference(ours, wanted) <= 1
    assert difference(ours[:1], ours[1:]) > 20
    # Encoded by this package, because of a setting that has no effect.
    skipping = generate_images(components.reading(1, None), PROMPTS[0], [5, 7], settings)
    assert difference(skipping, ours) <= 1


def test_rescaled_guidance_is_that_of_the_guider(components: Components, pipeline: Any) -> None:
    settings = SamplingSettings(
        steps=3, guidance_scale=6.0, guidance_rescale=0.7, width=64, height=64
    )
    ours = generate_images(components, PROMPTS[0], [5], settings)
    pipeline.guider.guidance_scale, pipeline.guider.guidance_rescale = 6.0, 0.7
    wanted = pipeline(
        prompt=PROMPTS[0], width=64, height=64, output="images", num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    pipeline.guider.guidance_rescale = 0.0
    assert difference(ours, wanted) <= 1


def test_an_image_is_painted_over_as_in_the_pipeline(components: Components, pipeline: Any) -> None:
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    settings = SamplingSettings(
        steps=4, guidance_scale=4.0, image=image, denoise=0.5, width=64, height=64
    )
    ours = generate_images(components, PROMPTS[0], [5], settings)
    pipeline.guider.guidance_scale = 4.0
    wanted = pipeline(
        prompt=PROMPTS[0], image=image, strength=0.5, width=64, height=64, output="images",
        num_inference_steps=4, generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    assert difference(ours, wanted) <= 1
    masked = SamplingSettings(steps=2, image=image, mask_image=Image.new("L", (64, 64), 255))
    with pytest.raises(ConfigError, match=r"mask_image cannot be used with .*: Diffusers' pipe"):
        generate_images(components, PROMPTS[0], [1], masked)


def test_large_images_are_decoded_in_tiles(folder: Path) -> None:
    latents = torch.randn(1, 4, 16, 16)
    tiled = load_components(folder)
    wanted = tiled.vae.decode(latents).sample
    tiled.vae.use_tiling, tiled.vae.tile_sample_min_size = True, 64
    own = diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae")
    own.enable_tiling(64, 64, 48, 48)
    with torch.no_grad():
        found, expected = tiled.vae.decode(latents).sample, own.decode(latents.unsqueeze(2)).sample
    assert torch.equal(found, expected.squeeze(2))
    assert not torch.equal(found, wanted)


def test_files_have_the_configurations_of_diffusers_classes(
    components: Components, folder: Path, tmp_path: Path
) -> None:
    for name in ("transformer", "vae", "text_conditioner"):
        components.modules()[name].save_pretrained(tmp_path / name)
        written, own = (
            json.loads((home / name / "config.json").read_text("utf-8"))
            for home in (tmp_path, folder)
        )
        for config in (written, own):
            config.pop("_name_or_path", None)
        assert written == own


def test_a_folder_may_be_moved(components: Components, folder: Path, tmp_path: Path) -> None:
    """Its index has the path of the folder that it was written to."""
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    settings = SamplingSettings(steps=1, width=64, height=64)
    wanted = generate_images(components, PROMPTS[0], [1], settings)
    assert (
        difference(generate_images(load_components(moved), PROMPTS[0], [1], settings), wanted) == 0
    )
