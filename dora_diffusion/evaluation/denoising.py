"""Denoising loss on held-out images at fixed timesteps and noise.

Nothing is sampled: models are compared on the same inputs, without noise from sampling. This is the
most sensitive measure, but also the weakest evidence: a low loss means that a model expects such
images, not that it can generate them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.data.crops import apply_crop, plan_crop
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.latents import (
    condition_from_moments,
    encode_inputs,
    latents_from_moments,
)
from dora_diffusion.models.offload import on_device
from dora_diffusion.models.text import encode_prompts, time_ids
from dora_diffusion.numerics.loss import denoising_loss, sample_noise

if TYPE_CHECKING:
    from PIL.Image import Image

TIMESTEPS = 10
NUM_SEEDS = 4
"""Default number of noise seeds for each image."""


@dataclass(frozen=True)
class _Encoded:
    """UNet inputs of an image.

    Attributes:
        latents: ``(1, C, h, w)`` float32.
        condition: Further channels ``(1, n, h, w)`` float32; None without any.
        time_ids: ``(1, 6)``; None if the family has none.
    """

    latents: Tensor
    condition: Tensor | None
    time_ids: Tensor | None


class HeldOutImages:
    """Held-out images of a model whose denoising loss is computed repeatedly during training.

    Images are encoded once, captions for each computation, since text encoders may train.
    """

    @torch.no_grad()
    def __init__(
        self, components: Components, images: Sequence[Image], captions: Sequence[str]
    ) -> None:
        """Encode n images, center-cropped to the model's resolution, with n captions.

        Raises:
            ValueError: If their numbers differ.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images, {len(captions)} captions")
        self._components, self.captions = components, list(captions)
        with on_device(components.device, components.vae):
            self._encoded = [_encode(components, image) for image in images]

    @torch.no_grad()
    def losses(self, seeds: Sequence[Sequence[int]], *, batch_size: int = 10) -> list[list[float]]:
        """Mean squared error of the prediction for each image, over evenly spaced timesteps.

        The timesteps of a flow are evenly spaced by the share of noise (`NoiseProcess.spaced`). The
        target follows the model's prediction type, without loss weighting. Adapters are left
        as they are. All noise comes from generators of the seeds.

        Args:
            seeds: Rounds of n seeds of the noise; use the same for all compared models.
            batch_size: Predictions per forward pass.

        Returns:
            n losses for each round.

        Raises:
            ValueError: If a round does not have n seeds.
        """
        components, count = self._components, len(self.captions)
        if mismatched := [row for row in seeds if len(row) != count]:
            raise ValueError(f"{count} images, {len(mismatched[0])} seeds")
        with components.eval_mode(), norm_scope(*components.adaptable().values()):
            with on_device(components.device, *components.text_encoders):
                encoded = {c: encode_prompts(components, [c]) for c in dict.fromkeys(self.captions)}
            conditioning = Conditioning.cat([encoded[caption] for caption in self.captions])
            return [
                [
                    _loss(components, image, conditioning[index], seed, batch_size)
                    for index, (image, seed) in enumerate(zip(self._encoded, row, strict=True))
                ]
                for row in seeds
            ]

    def losses_by_seed(self, seeds: Sequence[int], *, batch_size: int = 10) -> list[list[float]]:
        """Compute the losses with the same seed for all images, for each of several seeds."""
        return self.losses([[seed] * len(self.captions) for seed in seeds], batch_size=batch_size)


def _encode(components: Components, image: Image) -> _Encoded:
    size, side = (image.height, image.width), components.default_resolution
    crop = plan_crop(size, side, multiple=components.size_step)
    vae, family = components.vae, components.family
    moments = encode_inputs(vae, family, apply_crop(image, crop)[None])
    condition = condition_from_moments(vae, family, moments)
    return _Encoded(
        latents_from_moments(vae, moments).float(),
        None if condition is None else condition.float(),
        time_ids(family, [crop]),
    )


def _loss(
    components: Components, image: _Encoded, conditioning: Conditioning, seed: int, batch_size: int
) -> float:
    process = components.process  # Once: it copies its schedule to the device.
    timesteps = process.spaced(TIMESTEPS)
    shape = (image.latents.shape[1], image.latents.shape[2], image.latents.shape[3])
    noise = torch.stack(
        [sample_noise(shape, generator_for("held out", seed, int(t))) for t in timesteps]
    ).to(image.latents)
    losses = []
    for start in range(0, TIMESTEPS, batch_size):
        batch_noise = noise[start : start + batch_size]
        t = timesteps[start : start + batch_size].to(noise.device)
        count, ids, condition = len(t), image.time_ids, image.condition
        latents = image.latents.expand(count, -1, -1, -1)
        model_pred = components.predict(
            process.add_noise(latents, batch_noise, t),
            t,
            conditioning[[0] * count],
            None if ids is None else ids.expand(count, -1),
            None if condition is None else condition.expand(count, -1, -1, -1),
        )
        losses.append(denoising_loss(model_pred, process.target(latents, batch_noise, t)))
    return float(torch.cat(losses).mean())
