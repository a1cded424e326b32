"""The held-out loss against Diffusers' own modules, called one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.adapters.inject import adapter_parameters, disabled, inject_adapters
from dora_diffusion.config import AdapterConfig
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.evaluation.denoising import TIMESTEPS, HeldOutImages
from dora_diffusion.models.load import load_components


def noise_image(seed: int, size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_it_is_the_mean_squared_error_of_the_prediction(family, request) -> None:
    components = load_components(request.getfixturevalue(f"{family}_folder"))
    side = components.default_resolution
    image, caption = noise_image(0, (side, side)), "a photo of a dog"
    [found] = HeldOutImages(components, [image], [caption]).losses([[7]], batch_size=4)[0]

    pipeline = components.pipeline()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    errors = []
    with torch.no_grad():
        states, _, *pooled = pipeline.encode_prompt(
            caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        latents = components.vae.encode(pixels).latent_dist.mode()
        latents = latents * components.vae.config.scaling_factor
        ids = torch.tensor([[side, side, 0, 0, side, side]])
        added = {"text_embeds": pooled[0], "time_ids": ids} if family == "sdxl" else None
        for k in range(TIMESTEPS):
            t = int(1000 * (k + 0.5) / TIMESTEPS)
            noise = torch.randn(latents.shape[1:], generator=generator_for("held out", 7, t))[None]
            a = components.scheduler.alphas_cumprod[t]
            output = components.denoiser(
                a.sqrt() * latents + (1 - a).sqrt() * noise,
                t,
                states,
                added_cond_kwargs=added,
            ).sample
            target = noise if family != "sd2" else a.sqrt() * noise - (1 - a).sqrt() * latents
            errors.append(float((output - target).square().mean()))
    assert found == pytest.approx(np.mean(errors), rel=1e-4)


def test_an_adapter_moves_it_and_the_base_is_exact(sd1_folder) -> None:
    components = load_components(sd1_folder)
    images, captions = [noise_image(1, (80, 64)), noise_image(2, (64, 64))], ["a cat", "a dog"]
    before = HeldOutImages(components, images, captions).losses([[1, 2]])[0]
    assert before == HeldOutImages(components, images, captions).losses([[1, 2]])[0]
    assert before != HeldOutImages(components, images, captions).losses([[1, 3]])[0]
    inject_adapters(components.denoiser, AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in adapter_parameters(components.denoiser):
            parameter.add_(0.1)
    with disabled(components.denoiser):
        assert HeldOutImages(components, images, captions).losses([[1, 2]])[0] == before
    components.denoiser.train()
    assert HeldOutImages(components, images, captions).losses([[1, 2]])[0] != before
    assert components.denoiser.training
    with pytest.raises(ValueError, match="2 images, 1 captions"):
        HeldOutImages(components, images, captions[:1]).losses([[1, 2]])[0]
