"""One training step's loss, from latents and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.inject import disabled
from dora_diffusion.data.batch import Batch
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.models.denoise import predict
from dora_diffusion.models.latents import encode_moments, latents_from_moments
from dora_diffusion.models.text import Conditioning, encode_prompts, time_ids
from dora_diffusion.numerics.loss import (
    denoising_loss,
    loss_weight,
    prediction_loss,
    split_prior,
)
from dora_diffusion.numerics.noise import add_noise, sample_noise, sample_timestep

KNOWN_CAPTIONS = 256
"""Captions whose conditioning is kept, a third of a megabyte each for SDXL in half precision."""


@dataclass(frozen=True)
class StepInputs:
    """A batch with everything drawn, on the training device.

    Attributes:
        latents: ``(B, C, h, w)``, scaled.
        noise: ``(B, C, h, w)``.
        timesteps: ``(B,)`` int64.
        captions: B prompts.
        time_ids: ``(B, 6)`` where the family has them.
        is_prior: ``(B,)`` bool.
        class_captions: B prompts without the token, for the image-free prior; None without it.
        mask: ``(B, 1, h, w)`` in [0, 1], where to learn; None means everywhere.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: list[str]
    time_ids: Tensor | None
    is_prior: Tensor
    class_captions: list[str] | None = None
    mask: Tensor | None = None


def draw_inputs(
    components: Components,
    batch: Batch,
    *,
    seed: int,
    micro_step: int,
    first_row: int,
    noise_offset: float,
    class_captions: list[str] | None = None,
) -> StepInputs:
    """Draw the latents, noise and timesteps of a batch.

    Each row draws from a generator of its own, named by its place in the run. So the draws depend
    neither on how many processes share a batch nor on whether the run was interrupted.

    Args:
        components: The model.
        batch: Photos first, then their class images.
        seed: The run's seed.
        micro_step: Number of the batch since the start of the run.
        first_row: Place of this process's first photo in the global batch.
        noise_offset: See `sample_noise`.
        class_captions: Prompts for the image-free prior.
    """
    device = components.device
    generators = [
        generator_for("draw", seed, micro_step, first_row + row, prior)
        for row, prior in _rows(batch.is_prior.tolist())
    ]
    moments = batch.moments
    if moments is None:
        assert batch.pixels is not None
        with torch.no_grad():
            moments = encode_moments(components.vae, batch.pixels)
    moments = moments.to(device, torch.float32)
    rows = [
        latents_from_moments(components.vae, moments[i : i + 1], generator)
        for i, generator in enumerate(generators)
    ]
    latents = torch.cat(rows)
    steps = components.scheduler.config.num_train_timesteps
    timesteps = torch.stack([sample_timestep(steps, generator) for generator in generators])
    shape = (latents.shape[1], latents.shape[2], latents.shape[3])
    noise = torch.stack([sample_noise(shape, generator, noise_offset) for generator in generators])
    ids = None
    if components.family.has_time_ids:
        ids = torch.stack(
            [time_ids(c.original_size, c.crop_top_left, c.target_size) for c in batch.crops]
        ).to(device)
    return StepInputs(
        latents,
        noise.to(device),
        timesteps.to(device),
        batch.captions,
        ids,
        batch.is_prior.to(device),
        class_captions,
        None if batch.mask is None else area_mask(batch.mask, shape[1:]).to(device),
    )


def area_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A pixel mask ``(B, 1, H, W)`` at the latents' size: the share of each cell that it covers."""
    return nn.functional.interpolate(mask, size, mode="area")


def _rows(is_prior: list[bool]) -> list[tuple[int, bool]]:
    """Number photos and class images each from 0."""
    photos = is_prior.count(False)
    return [(i if not prior else i - photos, prior) for i, prior in enumerate(is_prior)]


class Conditioner:
    """Captions to conditioning: encoded once each, unless the text encoders train.

    The empty caption is the dropped one. It becomes what the pipeline's guidance uses where no
    negative prompt is given, so that caption dropout trains what is sampled: zeros where the
    pipeline says ``force_zeros_for_empty_prompt`` (SDXL), else the encoded empty prompt.
    """

    def __init__(self, components: Components, trains: bool) -> None:
        self.components = components
        self.trains = trains
        self._known: dict[str, Conditioning] = {}

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of B captions."""
        if self.trains:
            return self._encode(captions)
        found = {caption: self._encoded(caption) for caption in captions}
        while len(self._known) > KNOWN_CAPTIONS:  # Shuffled tags hardly ever come again.
            del self._known[next(iter(self._known))]
        return Conditioning.cat([found[caption] for caption in captions])

    def _encoded(self, caption: str) -> Conditioning:
        if caption not in self._known:
            with torch.no_grad():
                self._known[caption] = self._encode([caption])
        return self._known[caption]

    def _encode(self, captions: Sequence[str]) -> Conditioning:
        encoded = encode_prompts(self.components, captions)
        if not self.components.zeros_for_empty_prompt or all(captions):
            return encoded
        device = encoded.encoder_hidden_states.device
        dropped = torch.tensor([not caption for caption in captions], device=device)
        hidden = encoded.encoder_hidden_states.masked_fill(dropped.view(-1, 1, 1), 0)
        pooled = encoded.pooled
        return Conditioning(
            hidden, None if pooled is None else pooled.masked_fill(dropped.view(-1, 1), 0)
        )


class Objective(nn.Module):
    """The loss as one module, so that data-parallel wrappers see every parameter that trains."""

    def __init__(
        self,
        components: Components,
        *,
        train_text_encoder: bool,
        snr_gamma: float,
    ) -> None:
        super().__init__()
        self.unet = components.unet
        self.text_encoders = nn.ModuleList(components.text_encoders if train_text_encoder else [])
        self.condition = Conditioner(components, train_text_encoder)
        self.prediction_type = components.prediction_type
        self.snr_gamma = snr_gamma
        self.alphas_cumprod: Tensor
        self.register_buffer("alphas_cumprod", components.scheduler.alphas_cumprod)

    def forward(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Loss of the subject and of the prior, both scalar."""
        alpha_bar = self.alphas_cumprod[inputs.timesteps]
        noisy_latents = add_noise(inputs.latents, inputs.noise, alpha_bar)
        per_sample = prediction_loss(
            self._predict(noisy_latents, inputs, inputs.captions),
            inputs.latents,
            inputs.noise,
            alpha_bar,
            prediction_type=self.prediction_type,
            snr_gamma=self.snr_gamma,
            mask=inputs.mask,
        )
        subject, prior = split_prior(per_sample, inputs.is_prior)
        if inputs.class_captions is not None:
            weight = loss_weight(alpha_bar, self.snr_gamma, self.prediction_type)
            prior = self._image_free_prior(noisy_latents, inputs, inputs.class_captions, weight)
        return subject, prior

    def _predict(
        self, noisy_latents: Tensor, inputs: StepInputs, captions: Sequence[str]
    ) -> Tensor:
        conditioning = self.condition(captions)
        return predict(self.unet, noisy_latents, inputs.timesteps, conditioning, inputs.time_ids)

    def _image_free_prior(
        self,
        noisy_latents: Tensor,
        inputs: StepInputs,
        class_captions: Sequence[str],
        weight: Tensor | None,
    ) -> Tensor:
        """Hold the prediction for the class caption at that of the model without its adapter."""
        with torch.no_grad(), disabled(self.unet, *self.text_encoders):
            target = self._predict(noisy_latents, inputs, class_captions)
        model_pred = self._predict(noisy_latents, inputs, class_captions)
        return denoising_loss(model_pred, target, weight).mean()
