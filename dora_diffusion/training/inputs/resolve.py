"""Resolution of a run's settings, before the model is loaded and with model and data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dora_diffusion.adapters.inject import layers_to_adapt
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.derived import resolve
from dora_diffusion.config.fields import TOKENS_PER_CHUNK, require
from dora_diffusion.config.images import near_side
from dora_diffusion.config.wording import quoted
from dora_diffusion.data.dataset import DreamBoothDataset
from dora_diffusion.data.photos import read_photos
from dora_diffusion.data.sampler import EpochSampler
from dora_diffusion.models.components import Components
from dora_diffusion.models.precision import precision_of
from dora_diffusion.training.events import OnEvent
from dora_diffusion.training.features.code import Validate, code_of
from dora_diffusion.training.inputs.base import configure_reading
from dora_diffusion.training.inputs.dataset import (
    check_subject,
    list_subjects,
    open_dataset,
)
from dora_diffusion.training.inputs.subject import Subject
from dora_diffusion.training.optimizer import optimizer_library
from dora_diffusion.training.trainable.adapters import (
    StartingAdapter,
    adapter_configs,
    components_that_train,
    matched,
)


class RunPlan(NamedTuple):
    """Inputs of a run that are known before its model is loaded.

    Attributes:
        photos: Photos of each subject.
        validate: Opens the validation of the run; None: it has none.
        start: Adapter that the run starts from, or None.
    """

    photos: list[list[Path]]
    validate: Validate | None
    start: StartingAdapter | None


def plan_run(config: TrainConfig, subjects: Sequence[Subject]) -> RunPlan:
    """Find and check the inputs of a run without loading the model.

    Raises:
        ConfigError, PhotoError, AdapterFormatError: If an input is invalid.
    """
    optimizer_library(config.optimizer)
    photos, validate = list_subjects(subjects), None
    for one in code_of(config):
        if divided := one.hold_out(subjects, photos):
            photos, validate = divided
    return RunPlan(photos, validate, StartingAdapter.of(config))


def check_run(config: TrainConfig, subjects: Sequence[Subject], empty: Components) -> None:
    """Check the settings of a run without the weights of the model.

    Args:
        config: Settings.
        subjects: Subjects (`subjects_of`).
        empty: The model without weights (`load_empty`).

    Raises:
        ConfigError, PhotoError, TargetError, ValueError: If an input is invalid.
    """
    plan = plan_run(config, subjects)
    for subject, paths in zip(subjects, plan.photos, strict=True):
        prompt = subject.settings.instance_prompt or ""
        photos = read_photos(paths, prompt, skip_unreadable=True, per_line=True)
        if config.has_photos:
            check_subject(subject, photos)
    components = configure_reading(empty, config)
    check_with_model(components, config)
    if plan.start is not None:
        plan.start.read(components, config)


def check_with_model(components: Components, config: TrainConfig) -> None:
    """Check the layers that a run trains, its features and the sizes of its samples.

    Raises:
        TargetError, ValueError: If a target matches no layer, or a rank exceeds a layer.
        ConfigError: If the model cannot generate a sample of a size, or train a feature.
    """
    for one in code_of(config):
        one.check_model(components)
    step = components.size_step
    for prompt in config.prompts if config.num_validation_images else ():
        for name, side in (("width", prompt.width or 0), ("height", prompt.height or 0)):
            require(
                side % step == 0,
                f"{name} {side} of the sample prompt {quoted(prompt.prompt)} must be a multiple of "
                f"{step} on {components.family.title}, such as {near_side(side, step)}",
                "validation_prompt",
            )
    modules = components_that_train(components, config)
    if not config.trains_adapters:
        for name, model in modules.items() if config.uses("targets") else ():
            matched(name, model, config)
        return
    for name, adapter in adapter_configs(modules, config).items():
        layers_to_adapt(modules[name], adapter)


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
