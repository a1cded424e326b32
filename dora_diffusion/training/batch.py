"""Batches of a run: latents, noise and timesteps, drawn by their position in the run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_diffusion.config import TrainConfig
from dora_diffusion.data.crops import latent_mask
from dora_diffusion.data.dataset import SampleBatch
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import (
    condition_from_moments,
    encode_inputs,
    latents_from_moments,
)
from dora_diffusion.models.offload import send
from dora_diffusion.models.text import time_ids
from dora_diffusion.numerics.loss import sample_noise, sample_timestep, timestep_quantile
from dora_diffusion.numerics.process import NoiseProcess

Rows = tuple[int, ...] | None
"""Indices of some rows of a batch; None: all rows."""


class ModelInputs(NamedTuple):
    """Inputs of the denoiser except its conditioning.

    Attributes:
        noisy_latents: ``(B, C, h, w)``.
        timesteps: ``(B,)`` int64.
        time_ids: ``(B, 6)`` for families with size and crop conditioning, else None.
        condition: ``(B, n, h, w)``, channels after the noisy latents (inpainting), or None.
    """

    noisy_latents: Tensor
    timesteps: Tensor
    time_ids: Tensor | None = None
    condition: Tensor | None = None

    @classmethod
    def cat(cls, inputs: Sequence[ModelInputs]) -> ModelInputs:
        """Concatenate inputs of the same size along the rows."""
        return cls(*map(_cat, zip(*inputs, strict=True)))


@dataclass(frozen=True, eq=False)
class Batch:
    """Batch on the training device. Rows of photos come first, then rows of class images.

    Attributes:
        inputs: Inputs of the denoiser.
        latents: ``(B, C, h, w)``, scaled.
        noise: ``(B, C, h, w)``.
        captions: B prompts.
        photos: Number of photos.
        index: Index of the batch in the run, from 0.
        class_captions: Row -> caption without the subject, for photos with prior preservation
            without class images.
        mask: ``(B, 1, h, w)`` in [0, 1], 1 where the loss counts. None: the loss counts everywhere.
        masked_rows: Rows whose mask is below 1 somewhere.
        generators: Generator of each row, for terms that draw random numbers themselves.
    """

    inputs: ModelInputs
    latents: Tensor
    noise: Tensor
    captions: tuple[str, ...]
    photos: int
    index: int = 0
    class_captions: Mapping[int, str] = field(default_factory=dict)
    mask: Tensor | None = None
    masked_rows: Sequence[int] = ()
    generators: Sequence[torch.Generator] = ()
    _indices: dict[Rows, Tensor] = field(default_factory=dict, repr=False)

    def rows(self, indices: Collection[int]) -> Rows:
        """Return row indices as `Rows`: None if they include every row of the batch."""
        return tuple(indices) if len(indices) < len(self.captions) else None

    def inputs_of(self, rows: Rows) -> ModelInputs:
        """Select rows of the inputs."""
        return ModelInputs(*(_optional(partial(self.select, rows), t) for t in self.inputs))

    def select(self, rows: Rows, tensor: Tensor) -> Tensor:
        """Select rows of a tensor."""
        return tensor if rows is None else tensor[self.index_of(rows)]

    def index_of(self, rows: tuple[int, ...]) -> Tensor:
        """Return an index tensor of the rows on the batch's device. It is copied there once."""
        if rows not in self._indices:
            self._indices[rows] = send(torch.tensor(rows), self.latents.device)
        return self._indices[rows]


@dataclass
class Batches:
    """Iterator over the batches of a run.

    Attributes:
        config: Settings, including the seed and the distributions of noise and timesteps.
        components: The model.
        process: Noise process of the model.
        samples: Photos and class images of each batch.
        process_index: Index of this process among the processes that share a batch.
        index: Number of batches since the start of the run.
    """

    config: TrainConfig
    components: Components
    process: NoiseProcess
    samples: Iterator[SampleBatch]
    process_index: int = 0
    index: int = 0

    def __next__(self) -> Batch:
        """Draw the next batch."""
        samples = next(self.samples)
        first_row = self.process_index * samples.photos
        batch = draw_batch(
            self.components, self.process, samples, self.config, self.index, first_row
        )
        self.index += 1
        return batch


def draw_batch(
    components: Components,
    process: NoiseProcess,
    samples: SampleBatch,
    config: TrainConfig,
    index: int,
    first_row: int = 0,
) -> Batch:
    """Draw latents, noise and timesteps of a batch.

    Each row draws from its own generator, seeded by the row's position in the run. The draws
    therefore depend neither on the number of processes nor on interruptions.

    Args:
        components: The model.
        process: Noise process of the model.
        samples: Photos, then class images.
        config: Settings, including the seed and the distributions of noise and timesteps.
        index: Index of the batch in the run.
        first_row: Index of this process's first photo in the global batch.
    """
    device, vae, family = components.device, components.vae, components.family
    # A class image shares the position of its photo.
    positions = [(first_row + row, False) for row in range(samples.photos)]
    positions += [(first_row + row, True) for row in samples.partners]
    generators = [generator_for("draw", config.seed, index, *position) for position in positions]
    # Cached moments are on the CPU. Everything is drawn there and copied asynchronously.
    moments = samples.moments
    if moments is None:
        assert samples.pixels is not None
        with torch.no_grad():
            moments = encode_inputs(vae, family, samples.pixels)
    rows = list(zip(moments.to(torch.float32).split(1), generators, strict=True))
    latents = torch.cat([latents_from_moments(vae, *row) for row in rows])
    timesteps = _draw_timesteps(config, process.num_timesteps, generators)
    shape = (latents.shape[1], latents.shape[2], latents.shape[3])
    noise = torch.stack([sample_noise(shape, g, config.noise_offset) for g in generators])
    conditions = [condition_from_moments(vae, family, *row) for row in rows]
    mask = _optional(latent_mask, samples.mask, latents.shape[2:])
    latents, noise, timesteps = (send(t, device) for t in (latents, noise, timesteps))
    ids, condition = time_ids(family, samples.crops), _cat(conditions)
    ids, condition = (_optional(send, tensor, device) for tensor in (ids, condition))
    return Batch(
        ModelInputs(process.add_noise(latents, noise, timesteps), timesteps, ids, condition),
        latents=latents,
        noise=noise,
        captions=tuple(samples.captions),
        photos=samples.photos,
        index=index,
        class_captions={row: c for row, c in enumerate(samples.class_captions) if c is not None},
        mask=_optional(send, mask, device),
        masked_rows=() if mask is None else _excluding(mask),
        generators=generators,
    )


def _optional(function: Callable[..., Any], tensor: Tensor | None, *args: Any) -> Any:
    """Call a function with a tensor; return None without one."""
    return None if tensor is None else function(tensor, *args)


def _cat(tensors: Sequence[Any]) -> Any:
    """Concatenate tensors along the rows; a single tensor, or None, is returned unchanged."""
    first, *others = tensors
    return first if first is None or not others else torch.cat([first, *others])


def _draw_timesteps(
    config: TrainConfig, num_timesteps: int, generators: Sequence[torch.Generator]
) -> Tensor:
    quantile = None
    if config.timestep_distribution != "uniform":
        quantile = partial(
            timestep_quantile,
            distribution=config.timestep_distribution,
            mean=config.logit_mean,
            std=config.logit_std,
            power=config.timestep_power,
        )
    return torch.stack([sample_timestep(num_timesteps, g, quantile) for g in generators])


def _excluding(mask: Tensor) -> list[int]:
    """Return the rows whose mask is below 1 somewhere."""
    rows: list[int] = (mask < 1).flatten(1).any(dim=1).nonzero().flatten().tolist()
    return rows
