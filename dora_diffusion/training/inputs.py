"""What a step is computed from: latents, noise and timesteps, drawn by their place in the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.config import TrainConfig
from dora_diffusion.data.batch import Batch
from dora_diffusion.data.crops import latent_mask
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import encode_moments, latents_from_moments
from dora_diffusion.models.text import time_ids
from dora_diffusion.models.transfer import send
from dora_diffusion.numerics.loss import sample_noise, sample_timestep
from dora_diffusion.training.subject import Subject


@dataclass(frozen=True)
class StepInputs:
    """A batch with everything drawn, on the training device.

    Attributes:
        latents: ``(B, C, h, w)``, scaled.
        noise: ``(B, C, h, w)``.
        timesteps: ``(B,)`` int64.
        captions: B prompts.
        time_ids: ``(B, 6)`` where the family has them.
        photos: How many of the rows are photos; these come first, then class images.
        class_captions: B prompts without the token, for the image-free prior; None without it.
        mask: ``(B, 1, h, w)`` in [0, 1], where to learn; None means everywhere.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: list[str]
    time_ids: Tensor | None
    photos: int
    class_captions: list[str] | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class InputSource:
    """Gives a run's inputs: the next of ``batches``, with what is drawn for it."""

    config: TrainConfig
    subject: Subject
    components: Components
    batches: Iterator[Batch]
    process_index: int

    def __call__(self, micro_step: int) -> StepInputs:
        """The inputs of batch number ``micro_step`` since the start of the run."""
        batch, class_captions = next(self.batches), None
        if self.config.is_image_free:
            class_captions = [self.subject.class_caption(caption) for caption in batch.captions]
        photos = len(batch) - int(batch.is_prior.sum())
        return draw_inputs(
            self.components,
            batch,
            seed=self.config.seed,
            micro_step=micro_step,
            first_row=self.process_index * photos,
            noise_offset=self.config.noise_offset,
            class_captions=class_captions,
        )


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
    device, photos = components.device, int((~batch.is_prior).sum())
    # Photos and class images are numbered each from 0.
    generators = [
        generator_for("draw", seed, micro_step, first_row + row % photos, prior)
        for row, prior in enumerate(batch.is_prior.tolist())
    ]
    # Cached moments are on the CPU: there everything is drawn, and sent without waiting.
    rows = _moments(components, batch).to(torch.float32).split(1)
    latents = torch.cat(
        [latents_from_moments(components.vae, *pair) for pair in zip(rows, generators, strict=True)]
    )
    steps = components.scheduler.config.num_train_timesteps
    timesteps = torch.stack([sample_timestep(steps, generator) for generator in generators])
    shape = (latents.shape[1], latents.shape[2], latents.shape[3])
    noise = torch.stack([sample_noise(shape, generator, noise_offset) for generator in generators])
    ids = mask = None
    if batch.mask is not None:
        mask = latent_mask(batch.mask, shape[1:])
    if components.family.has_time_ids:
        ids = torch.stack(
            [time_ids(c.original_size, c.crop_top_left, c.target_size) for c in batch.crops]
        )
    return StepInputs(
        send(latents, device),
        send(noise, device),
        send(timesteps, device),
        batch.captions,
        None if ids is None else send(ids, device),
        photos,
        class_captions,
        None if mask is None else send(mask, device),
    )


@torch.no_grad()
def _moments(components: Components, batch: Batch) -> Tensor:
    """The autoencoder's moments of a batch, ``(B, 2C, h, w)``."""
    if batch.moments is not None:
        return batch.moments
    assert batch.pixels is not None
    return encode_moments(components.vae, batch.pixels)
