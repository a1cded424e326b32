"""The denoising loss on held-out images at fixed timesteps and noise.

Nothing is sampled: two models are asked the same questions, and their difference is not blurred by
luck. That makes it the most sensitive of all measures, and the least telling: it says that a model
expects such images, not that it can make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.data.crops import apply_crop, plan_crop
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import (
    condition_from_moments,
    encode_inputs,
    latents_from_moments,
    predict,
)
from dora_diffusion.models.text import Conditioning, encode_prompts, time_ids
from dora_diffusion.numerics.loss import add_noise, prediction_loss, sample_noise

if TYPE_CHECKING:
    from PIL.Image import Image

TIMESTEPS = 10


@torch.no_grad()
def held_out_losses(
    components: Components,
    images: Sequence[Image],
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 10,
) -> list[float]:
    """Each image's mean squared error of the model's prediction, over evenly spaced timesteps.

    The target is the model's own (noise or velocity), without a weight.

    Args:
        components: The model, with whatever adapters are on.
        images: n images, cut to the model's resolution from the middle.
        captions: n prompts.
        seeds: n seeds of the noise; the same for every model that is compared.
        batch_size: Predictions at once.

    Raises:
        ValueError: The lengths differ.
    """
    if not len(images) == len(captions) == len(seeds):
        raise ValueError(f"{len(images)} images, {len(captions)} captions, {len(seeds)} seeds")
    with components.eval_mode(), norm_scope(*components.adaptable().values()):
        conditioning = _conditioning(components, captions)
        return [
            _loss(components, image, conditioning[row], seed, batch_size)
            for row, (image, seed) in enumerate(zip(images, seeds, strict=True))
        ]


def _conditioning(components: Components, captions: Sequence[str]) -> Conditioning:
    """Conditioning of n captions, each distinct one encoded once."""
    encoded = {c: encode_prompts(components, [c]) for c in dict.fromkeys(captions)}
    return Conditioning.cat([encoded[caption] for caption in captions])


def _loss(
    components: Components, image: Image, conditioning: Conditioning, seed: int, batch_size: int
) -> float:
    size, side = (image.height, image.width), components.default_resolution
    crop = plan_crop(size, side, multiple=components.vae_factor)
    vae, family = components.vae, components.family
    moments = encode_inputs(vae, family, apply_crop(image, crop)[None])
    latents = latents_from_moments(vae, moments).float()
    condition = condition_from_moments(vae, family, moments)
    steps = components.scheduler.config.num_train_timesteps
    timesteps = ((torch.arange(TIMESTEPS) + 0.5) / TIMESTEPS * steps).long()
    shape = (latents.shape[1], latents.shape[2], latents.shape[3])
    noise = torch.stack(
        [sample_noise(shape, generator_for("held out", seed, int(t))) for t in timesteps]
    ).to(latents)
    ids = time_ids(family, [crop])
    losses = [
        _batch_loss(components, latents, noise[part], timesteps[part], conditioning, ids, condition)
        for part in (slice(i, i + batch_size) for i in range(0, TIMESTEPS, batch_size))
    ]
    return float(torch.cat(losses).mean())


def _batch_loss(
    components: Components,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    ids: Tensor | None,
    condition: Tensor | None,
) -> Tensor:
    """Loss of each of B timesteps for one image's latents (1, C, h, w): (B,)."""
    count = len(timesteps)
    timesteps, latents = timesteps.to(latents.device), latents.expand(count, -1, -1, -1)
    alpha_bar = components.scheduler.alphas_cumprod.to(latents.device)[timesteps]
    model_pred = predict(
        components.unet,
        add_noise(latents, noise, alpha_bar),
        timesteps,
        conditioning[[0] * count],
        None if ids is None else ids.expand(count, -1),
        None if condition is None else condition.float().expand(count, -1, -1, -1),
    )
    return prediction_loss(
        model_pred, latents, noise, alpha_bar, prediction_type=components.prediction_type
    )
