"""Inputs of a step: latents, noise and timesteps by their place in the run, and conditioning."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from dora_diffusion.config import TrainConfig
from dora_diffusion.data.crops import latent_mask
from dora_diffusion.data.dataset import Batch
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import (
    condition_from_moments,
    encode_inputs,
    latents_from_moments,
)
from dora_diffusion.models.offload import on_device, send
from dora_diffusion.models.text import (
    Conditioning,
    encode_prompts,
    encode_unconditional,
    time_ids,
)
from dora_diffusion.models.words import has_words
from dora_diffusion.numerics.loss import sample_noise, sample_timestep

# A third of a megabyte each for SDXL in half precision.
KNOWN_CAPTIONS = 256


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
        class_captions: Of each photo its caption without the subject, for the image-free prior,
            or None where that does not hold it; empty where it holds none.
        mask: ``(B, 1, h, w)`` in [0, 1], where to learn; None means everywhere.
        condition: ``(B, n, h, w)``, what the UNet reads beside the noisy latents; None if nothing.
        weights: ``(photos,)``, the factor of each photo's loss; None where all are 1.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: list[str]
    time_ids: Tensor | None
    photos: int
    class_captions: Sequence[str | None] = ()
    mask: Tensor | None = None
    condition: Tensor | None = None
    weights: Tensor | None = None

    def of_class(self) -> tuple[StepInputs, slice | Tensor] | None:
        """The photos whose image-free prior is held, with class captions, and their rows."""
        captions = {row: text for row, text in enumerate(self.class_captions) if text is not None}
        if not captions:
            return None
        rows: slice | Tensor = slice(None)
        if len(captions) < len(self.captions):
            rows = send(torch.tensor(list(captions)), self.latents.device)
        ids, condition = (p if p is None else p[rows] for p in (self.time_ids, self.condition))
        drawn = (self.latents[rows], self.noise[rows], self.timesteps[rows])
        photos, texts = len(captions), list(captions.values())
        return StepInputs(*drawn, texts, ids, photos, condition=condition), rows

    @classmethod
    def cat(cls, parts: Sequence[StepInputs]) -> StepInputs:
        """The rows of several inputs of one size, for one prediction of all; no loss is in them."""
        if len(parts) == 1:
            return parts[0]

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        def joined_if(name: str) -> Tensor | None:
            return None if getattr(parts[0], name) is None else joined(name)

        drawn = (joined("latents"), joined("noise"), joined("timesteps"))
        captions = [caption for part in parts for caption in part.captions]
        return cls(*drawn, captions, joined_if("time_ids"), 0, condition=joined_if("condition"))


@dataclass(frozen=True)
class InputSource:
    """Source of a run's inputs: the next of ``batches``, with what is drawn for it."""

    config: TrainConfig
    components: Components
    batches: Iterator[Batch]
    process_index: int

    def __call__(self, micro_step: int) -> StepInputs:
        """The inputs of batch number ``micro_step`` since the start of the run."""
        batch = next(self.batches)
        photos = len(batch) - int(batch.is_prior.sum())
        return draw_inputs(
            self.components,
            batch,
            seed=self.config.seed,
            micro_step=micro_step,
            first_row=self.process_index * photos,
            noise_offset=self.config.noise_offset,
        )


def draw_inputs(
    components: Components,
    batch: Batch,
    *,
    seed: int,
    micro_step: int,
    first_row: int,
    noise_offset: float,
) -> StepInputs:
    """Draw the latents, noise and timesteps of a batch.

    Each row draws from a generator of its own, named by its place in the run. So the draws depend
    neither on how many processes share a batch nor on whether the run was interrupted.

    Args:
        components: The model.
        batch: Photos first, then the class images of those that have one.
        seed: The run's seed.
        micro_step: Number of the batch since the start of the run.
        first_row: Place of this process's first photo in the global batch.
        noise_offset: See `sample_noise`.
    """
    device, photos = components.device, int((~batch.is_prior).sum())
    vae, family = components.vae, components.family
    # A class image has its photo's number.
    rows_drawn = [*((row, False) for row in range(photos)), *((r, True) for r in batch.partners)]
    generators = [
        generator_for("draw", seed, micro_step, first_row + row, prior) for row, prior in rows_drawn
    ]
    # Cached moments are on the CPU: there everything is drawn, and sent without waiting.
    moments = batch.moments
    if moments is None:
        assert batch.pixels is not None
        with torch.no_grad():
            moments = encode_inputs(vae, family, batch.pixels)
    rows = moments.to(torch.float32).split(1)
    latents = torch.cat(
        [latents_from_moments(vae, *pair) for pair in zip(rows, generators, strict=True)]
    )
    steps = components.scheduler.config.num_train_timesteps
    timesteps = torch.stack([sample_timestep(steps, generator) for generator in generators])
    shape = (latents.shape[1], latents.shape[2], latents.shape[3])
    noise = torch.stack([sample_noise(shape, generator, noise_offset) for generator in generators])
    mask = None if batch.mask is None else latent_mask(batch.mask, shape[1:])
    ids = time_ids(family, batch.crops)
    drawn = (condition_from_moments(vae, family, *p) for p in zip(rows, generators, strict=True))
    conditions = [condition for condition in drawn if condition is not None]
    return StepInputs(
        send(latents, device),
        send(noise, device),
        send(timesteps, device),
        batch.captions,
        None if ids is None else send(ids, device),
        photos,
        batch.class_captions,
        None if mask is None else send(mask, device),
        send(torch.cat(conditions), device) if conditions else None,
        None if batch.weights is None else send(batch.weights, device),
    )


class Conditioner:
    """Captions to conditioning: encoded once each, unless the text encoders or new words train.

    The empty caption is the dropped one. It becomes what the pipeline's guidance uses where no
    negative prompt is given, so that caption dropout trains what is sampled: zeros where the
    pipeline says ``force_zeros_for_empty_prompt`` (SDXL), else the encoded empty prompt.
    """

    def __init__(self, components: Components, trains: bool) -> None:
        self.components = components
        self.trains = trains
        self.has_words = lru_cache(KNOWN_CAPTIONS)(partial(has_words, components))
        self._known: dict[str, Conditioning] = {}

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of B captions."""
        fresh = [caption for caption in captions if self.trains or self.has_words(caption)]
        if len(fresh) == len(captions):
            return self._encode(captions)
        encoded = {caption: self._encoded(caption) for caption in captions if caption not in fresh}
        while len(self._known) > KNOWN_CAPTIONS:  # Shuffled tags hardly ever recur.
            del self._known[next(iter(self._known))]
        if fresh:
            rows = self._encode(fresh)
            encoded |= {caption: rows[row] for row, caption in enumerate(fresh)}
        return Conditioning.cat([encoded[caption] for caption in captions])

    def keep(self, captions: Collection[str]) -> bool:
        """Encode captions now, so that no later call with them does.

        Returns:
            Whether that holds: not if the text encoders train, or a new word in a caption, or
            captions are too many to keep.
        """
        if self.trains or len(captions) > KNOWN_CAPTIONS or any(map(self.has_words, captions)):
            return False
        for caption in captions:
            self._encoded(caption)
        return True

    def _encoded(self, caption: str) -> Conditioning:
        if caption not in self._known:
            components = self.components
            with torch.no_grad(), on_device(components.device, *components.text_encoders):
                self._known[caption] = self._encode([caption])
        return self._known[caption]

    def _encode(self, captions: Sequence[str]) -> Conditioning:
        components = self.components
        encoded = encode_prompts(components, captions)
        if all(captions):
            return encoded
        if not components.zeros_for_empty_prompt:
            if not components.clip_skip:
                return encoded
            empty = encode_unconditional(components)
            return Conditioning.cat([encoded[k] if c else empty for k, c in enumerate(captions)])
        device = encoded.encoder_hidden_states.device
        dropped = send(torch.tensor([not caption for caption in captions]), device)
        hidden = encoded.encoder_hidden_states.masked_fill(dropped.view(-1, 1, 1), 0)
        pooled = encoded.pooled
        return Conditioning(
            hidden, None if pooled is None else pooled.masked_fill(dropped.view(-1, 1), 0)
        )
