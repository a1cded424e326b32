"""Data of a run, and the settings that depend on its model and its data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.derived import resolve
from dora_diffusion.config.fields import TOKENS_PER_CHUNK
from dora_diffusion.data.dataset import DreamBoothDataset
from dora_diffusion.data.sampler import EpochSampler
from dora_diffusion.models.components import Components
from dora_diffusion.models.precision import precision_of
from dora_diffusion.training.events import OnEvent
from dora_diffusion.training.inputs.dataset import (
    open_dataset,
)
from dora_diffusion.training.inputs.subject import Subject


class RunData(NamedTuple):
    """Data of a run.

    Attributes:
        dataset: Photos and class images.
        sampler: Order of this process's batches.
    """

    dataset: DreamBoothDataset
    sampler: EpochSampler


def open_data(
    config: TrainConfig,
    subjects: Sequence[Subject],
    photos: Sequence[Sequence[Path]],
    components: Components,
    accelerator: Any,
    on_event: OnEvent,
) -> RunData:
    """Open the photos of a run and generate missing class images.

    Args:
        config: Settings.
        subjects: Subjects.
        photos: Photos of each subject.
        components: The model, without adapters.
        accelerator: Devices and processes.
        on_event: Called with `ClassImagesProgress`.

    Raises:
        ConfigError, PhotoError: If the images cannot be trained on.
    """
    dataset = open_dataset(config, subjects, components, photos, accelerator, on_event)
    _warn_of_small_data(config, components, dataset)
    has_buckets = any(s.settings.aspect_ratio_buckets for s in subjects) and config.has_photos
    sampler = EpochSampler(
        len(dataset),
        batch_size=config.train_batch_size,
        seed=config.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        groups=dataset.groups if has_buckets or len(set(dataset.groups)) > 1 else None,
        repeats=dataset.repeats,
    )
    return RunData(dataset, sampler)


def resolve_settings(
    config: TrainConfig,
    subjects: Sequence[Subject],
    components: Components,
    data: RunData,
    accelerator: Any,
) -> TrainConfig:
    """Resolve the settings that depend on the model and the data."""
    if config.num_validation_images and not any(s.settings.instance_prompt for s in subjects):
        prompts = config.validation_prompt or data.dataset.captions[:1]
        config = replace(config, validation_prompt=prompts)
    accumulation, batches = config.gradient_accumulation_steps, data.sampler.batches_per_epoch
    total_steps = config.max_train_steps or components.family.default_steps
    if config.max_train_steps is None and config.num_train_epochs is not None:
        total_steps = max(1, -(-config.num_train_epochs * batches // accumulation))
    return resolve(
        config,
        family=components.family,
        prediction_type=components.prediction_type,
        resolution=run_resolution(config, components),
        total_steps=total_steps,
        steps_per_epoch=-(-batches // accumulation),
        mixed_precision=precision_of(config.mixed_precision, accelerator.device),
    )


def run_resolution(config: TrainConfig, components: Components) -> int:
    """Return the resolution of a run: its setting, or the largest of subjects with their own."""
    sides = [s.resolution or components.default_resolution for s in config.subjects]
    has_own = all(subject.resolution for subject in config.subjects)
    return config.resolution or (max(sides) if has_own else components.default_resolution)


def _warn_of_small_data(
    config: TrainConfig, components: Components, dataset: DreamBoothDataset
) -> None:
    """Warn of settings without effect because captions or images are small."""
    texts = {*dataset.captions, *(prompt.prompt for prompt in config.prompts)}
    sampled = [(p.width, p.height) for p in config.prompts if config.num_validation_images]
    sides = [s or components.default_resolution for size in sampled for s in size]
    longest = max(sides + [side for size in dataset.groups for side in size])
    is_set = config.max_token_length != TOKENS_PER_CHUNK
    is_set = is_set and "max_token_length" not in components.family.without_effect
    if is_set and all(components.code.chunk_count(components, text) == 1 for text in texts):
        warnings.warn(
            f"max_token_length {config.max_token_length} has no effect because no caption or "
            f"sample prompt has more than {TOKENS_PER_CHUNK} tokens",
            stacklevel=3,
        )
    if longest <= (config.vae_tile_size or 0):
        warnings.warn(
            f"vae_tile_size {config.vae_tile_size} has no effect because no image is larger than "
            f"{longest} pixels",
            stacklevel=3,
        )
