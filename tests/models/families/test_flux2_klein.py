"""FLUX.2-klein against Diffusers' own pipeline and transformer, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from dora_diffusion.config import ConfigError
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import encode_moments, latents_from_moments
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.settings import SamplingSettings
from tests.flux2_klein import write_flux2_klein

PROMPTS = ["a photo of sks mug", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux2_klein(tmp_path_factory.mktemp("klein") / "model")


@pytest.fixture(scope="module")
def components(folder: Path) -> Components:
    return load_components(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Flux2KleinPipeline:
    loaded = Flux2KleinPipeline.from_pretrained(folder, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@torch.no_grad()
def test_prompts_are_encoded_as_in_the_pipeline(
    components: Components, pipeline: Flux2KleinPipeline
) -> None:
    encoded = encode_prompts(components, PROMPTS).encoder_hidden_states
    wanted, _ = pipeline.encode_prompt([*PROMPTS])
    assert encoded.shape == (2, 512, 24)
    torch.testing.assert_close(encoded, wanted, rtol=0, atol=1e-6)


@torch.no_grad()
def test_latents_are_those_of_the_pipeline(
    components: Components, pipeline: Flux2KleinPipeline
) -> None:
    pixels = torch.rand(1, 3, 64, 48) * 2 - 1
    latents = latents_from_moments(components.vae, encode_moments(components.vae, pixels))
    wanted = pipeline._encode_vae_image(pixels, torch.Generator())
    assert latents.shape == (1, 16, 4, 3)
    torch.testing.assert_close(latents, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_predictions_are_those_of_the_transformer(
    components: Components, pipeline: Flux2KleinPipeline
) -> None:
    noisy, timesteps = torch.randn(2, 16, 4, 3), torch.tensor([100, 899])
    predicted = components.predict(noisy, timesteps, encode_prompts(components, PROMPTS))
    states, text_ids = pipeline.encode_prompt([*PROMPTS])
    ids = pipeline._prepare_latent_ids(noisy)
    (packed,) = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy), timestep=(timesteps + 1) / 1000,
        encoder_hidden_states=states, txt_ids=text_ids, img_ids=ids, return_dict=False,
    )  # fmt: skip
    wanted = pipeline._unpack_latents_with_ids(packed, ids, 4, 3)
    torch.testing.assert_close(predicted, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("negative", ["", "a dog"])
def test_an_image_is_that_of_the_pipeline(
    components: Components, pipeline: Flux2KleinPipeline, negative: str
) -> None:
    settings = SamplingSettings(steps=2, guidance_scale=3.0, negative_prompt=negative)
    ours = generate_images(components, PROMPTS[0], [5, 7], settings)
    states, _ = pipeline.encode_prompt([negative])
    for image, seed in zip(ours, (5, 7), strict=True):
        wanted = pipeline(
            prompt=PROMPTS[0], height=64, width=64, num_inference_steps=2, guidance_scale=3.0,
            negative_prompt_embeds=states, generator=torch.Generator().manual_seed(seed),
        ).images[0]  # fmt: skip
        pair = (np.asarray(each, dtype=np.int16) for each in (image, wanted))
        assert np.abs(np.subtract(*pair)).max() <= 1


def test_images_to_paint_over_are_refused(components: Components) -> None:
    settings = SamplingSettings(steps=2, image=Image.new("RGB", (64, 64)))
    with pytest.raises(ConfigError, match=r"image cannot be used with .*: Diffusers' pipeline"):
        generate_images(components, PROMPTS[0], [1], settings)
