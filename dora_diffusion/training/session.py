"""A run's parts, put together: model, data, adapters, optimizer, and the step over them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from dora_diffusion.adapters.compiled import require_compiler
from dora_diffusion.adapters.inject import AdapterSet, layers_to_adapt
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.derived import resolve
from dora_diffusion.config.fields import TOKENS_PER_CHUNK
from dora_diffusion.data.dataset import DreamBoothDataset, iterate_batches
from dora_diffusion.data.photos import read_photos
from dora_diffusion.data.sampler import EpochSampler
from dora_diffusion.models.components import Components
from dora_diffusion.models.load import load_components
from dora_diffusion.models.offload import HOST, move_frozen, on_device, place_model
from dora_diffusion.models.precision import PRECISION_DTYPES, precision_of
from dora_diffusion.models.text import chunk_count
from dora_diffusion.numerics.devices import release_memory
from dora_diffusion.training.engine.accelerator import shards_model
from dora_diffusion.training.engine.gradient_start import start_from_gradient
from dora_diffusion.training.engine.objective import InputSource
from dora_diffusion.training.engine.optimizer import optimizer_library
from dora_diffusion.training.engine.step import Learner, TrainingEngine, build_learner
from dora_diffusion.training.events import CachingProgress, OnEvent, ignore
from dora_diffusion.training.inputs.dataset import (
    check_subject,
    check_wildcards,
    list_subjects,
    open_dataset,
)
from dora_diffusion.training.inputs.subject import Subject, triggers_of
from dora_diffusion.training.results.effect import Probe
from dora_diffusion.training.results.validation import Validation, check_held_out, divide_all
from dora_diffusion.training.trainable.adapters import (
    StartingAdapter,
    adapter_configs,
    components_that_train,
    enter_training,
    inject_trained,
)
from dora_diffusion.training.trainable.full import TrainedWeights, check_weights, select_weights
from dora_diffusion.training.trainable.words import add_words, require_new

LoadBase = Callable[..., Components]
"""`load_components`, or a `BaseCache` in its place."""


@dataclass(frozen=True)
class Session:
    """A run that is ready for its next step.

    Attributes:
        config: All settings, those that were left open resolved.
        subjects: What is taught.
        accelerator: What `make_accelerator` made.
        components: The model, with the adapters on it where it trains some.
        weights: What trains.
        dataset: Photos and class images.
        sampler: The order of this process's batches.
        learner: What trains, step by step.
        probe: Measures how far the model has moved.
        validation: Takes the loss on held-out photos; None without any.
        activate: Puts its adapters on the model, where several sessions take turns on it.
    """

    config: TrainConfig
    subjects: Sequence[Subject]
    accelerator: Any
    components: Components
    weights: TrainedWeights
    dataset: DreamBoothDataset
    sampler: EpochSampler
    learner: Learner
    probe: Probe
    validation: Validation | None = None
    activate: Callable[[], None] = lambda: None

    @property
    def report(self) -> str:
        """Trained parameters."""
        words = [str(self.weights.words)] if self.weights.words.tables else []
        return " and ".join([str(self.weights.report), *words])

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides in pixels that are trained at, the least first."""
        sides = {s.settings.resolution or self.config.resolution for s in self.subjects}
        return tuple(sorted(filter(None, sides)))

    @property
    def trigger(self) -> str:
        """The trigger words of all subjects."""
        return triggers_of(self.subjects)

    @property
    def total_steps(self) -> int:
        """Optimizer steps asked for."""
        assert self.config.max_train_steps is not None
        return self.config.max_train_steps

    @cached_property
    def _engine(self) -> TrainingEngine:
        return TrainingEngine([self.learner])

    def step(self, number: int) -> dict[str, Any]:
        """Run an optimizer step of this run alone; returns its numbers, still on the device.

        Args:
            number: The step's, from 1.

        Raises:
            TrainingError: See `Learner.update`.
        """
        (outcome,) = self._engine([number])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def start_from_gradient(self, adapters: AdapterSet) -> float | None:
        """Give fresh adapters the start that is made from the gradient of the run's first batches.

        Returns:
            Their drift (`start_from_gradient`); None where ``init`` is another.
        """
        config = self.config
        if config.is_full or config.init != "lora-one":
            return None
        count = min(config.gradient_batches, self.total_steps * config.gradient_accumulation_steps)
        # A sampler of its own: the run's stays where it is.
        batches = iterate_batches(self.dataset, replace(self.sampler))
        source = replace(self.learner.inputs, batches=batches)
        drift = start_from_gradient(self.learner, adapters, [source(k) for k in range(count)])
        if self.learner.average is not None:
            self.learner.average.leave()  # It starts there too.
        return drift

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use this run's adapters, or weights, as its result has them inside the block.

        Where these are an average, what trains is put back in the end.
        """
        self.activate()
        if self.learner.average is None:
            yield
            return
        with self.learner.average.in_use():
            yield

    def data_position(self) -> dict[str, Any]:
        """Return the position of the run in its data."""
        return {"sampler": self.sampler.state_dict(), "batches": self.learner.batches}

    def cache_ahead(self, steps: int, on_event: OnEvent) -> None:
        """Encode crops and captions of the steps that come, by modules that then stay offloaded.

        They are drawn by seed, epoch and photo, so that those of the whole run are known. One
        module at a time is on the device meanwhile. Text encoders come to stay where the captions
        are more than are kept, as with shuffled tags.

        Args:
            steps: Optimizer steps that are left.
            on_event: Called with `CachingProgress`.
        """
        components, dataset, config = self.components, self.dataset, self.config
        device = components.offload_to
        if device is None or steps <= 0:
            return
        batches = islice(self.sampler, steps * config.gradient_accumulation_steps)
        indices = list(chain.from_iterable(batches))
        with on_device(HOST, components.unet):
            if dataset.encode is not None:
                with on_device(device, components.vae):
                    dataset.fill_cache(indices, lambda *done: on_event(CachingProgress(*done)))
            if not config.encodes_in_steps:
                ends = chain.from_iterable(ends for _, ends in config.slider_pairs)
                self._cache_captions({*dataset.all_captions(indices), *ends})
        release_memory()

    def _cache_captions(self, captions: set[str]) -> None:
        components, device = self.components, self.components.device
        condition = self.learner.objective.condition
        # Steps encode inside of autocast, which computes some operations in float32.
        with self.accelerator.autocast(), on_device(device, *components.text_encoders):
            kept = condition.keep(sorted(captions))
        if kept:
            return
        for encoder in components.text_encoders:
            move_frozen(encoder, device)
        if self.config.offload == "model":
            warnings.warn(
                f"offload: the text encoders stay on the device, since {len(captions)} different "
                "captions are more than are cached",
                stacklevel=4,
            )


def open_session(
    config: TrainConfig,
    subjects: Sequence[Subject],
    accelerator: Any,
    on_event: OnEvent = ignore,
    base: Components | None = None,
    load: LoadBase | None = None,
) -> Session:
    """Load the model, choose what trains, and make the data and the optimizer.

    Args:
        config: All settings.
        subjects: What it is taught (`subjects_of`).
        accelerator: What `make_accelerator` made.
        on_event: Called with `ClassImagesProgress` while those are generated.
        base: The model, if it is there already (`load_base`), without adapters.
        load: Loads the model, see `load_base`.

    Raises:
        ConfigError, PhotoError, ModelNotFoundError, TargetError: With what to do.
    """
    precision = precision_of(config.mixed_precision, accelerator.device)
    # Before the model is loaded, which takes longer.
    optimizer_library(config.optimizer_name)
    if config.compile:
        require_compiler(accelerator.device)
    paths, held_out = _divided(subjects)
    start = StartingAdapter.of(config)
    components = _reading(base or load_base(config, accelerator, load), config)
    config = replace(config, resolution=_resolution(config, components))
    require_new(components, config.words)
    start = start.read(components, config) if start else None
    dataset = open_dataset(config, subjects, components, paths, accelerator, on_event)
    _warn_of_small_data(config, components, dataset)
    has_buckets = any(s.settings.aspect_ratio_buckets for s in subjects) and not config.is_slider
    sampler = EpochSampler(
        len(dataset),
        batch_size=config.train_batch_size,
        seed=config.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        groups=dataset.groups if has_buckets or len(set(dataset.groups)) > 1 else None,
        repeats=dataset.repeats,
    )
    if config.num_validation_images and not any(s.settings.instance_prompt for s in subjects):
        prompts = config.validation_prompt or dataset.captions[:1]
        config = replace(config, validation_prompt=prompts)
    config = _resolved(config, components, sampler.batches_per_epoch, precision)
    pairs = list(zip(subjects, held_out, strict=True))
    validation = Validation(config, pairs, components, accelerator) if any(held_out) else None
    _load_step_modules(config, components)
    weights = _what_trains(config, components, start)
    batches = iterate_batches(dataset, sampler, num_workers=config.dataloader_num_workers)
    place = accelerator.process_index, accelerator.num_processes
    inputs = InputSource(config, components, batches, *place)
    learner = build_learner(config, accelerator, components, weights, inputs)
    return Session(
        config, subjects, accelerator, components, weights, dataset, sampler, learner,
        Probe(components, weights, dataset.captions, shards_model(accelerator)), validation,
    )  # fmt: skip


def check_session(config: TrainConfig, subjects: Sequence[Subject], empty: Components) -> None:
    """Check settings as `open_session` would, without a model's weights.

    Args:
        config: All settings.
        subjects: What it is taught (`subjects_of`).
        empty: The model without weights (`load_empty`).

    Raises:
        ConfigError, PhotoError, TargetError, ValueError: With what to do.
    """
    optimizer_library(config.optimizer_name)
    for subject, paths in zip(subjects, _divided(subjects)[0], strict=True):
        prompt = subject.settings.instance_prompt or ""
        photos = read_photos(paths, prompt, skip_unreadable=True, per_line=True)
        if not config.is_slider:
            check_subject(subject, photos)
    start = StartingAdapter.of(config)
    components = _reading(empty, config)
    require_new(components, config.words)
    if start is not None:
        start.read(components, config)
    modules = components_that_train(components, config)
    if config.is_full:
        check_weights(modules, config)
        return
    for name, adapter in adapter_configs(modules, config).items():
        layers_to_adapt(modules[name], adapter)


def _divided(subjects: Sequence[Subject]) -> tuple[list[list[Path]], list[list[Path]]]:
    """The photos of each subject, and those that it holds out, their captions checked."""
    paths, held_out = divide_all(subjects, list_subjects(subjects))
    for subject, photos, others in zip(subjects, paths, held_out, strict=True):
        check_wildcards(subject.settings, photos)
        check_held_out(subject, others)
    return paths, held_out


def load_base(config: TrainConfig, accelerator: Any, load: LoadBase | None = None) -> Components:
    """Load a run's base model, and put it where the settings want it.

    Args:
        config: The run's settings.
        accelerator: What `make_accelerator` made.
        load: Loads it, for adapters, which write to none of its weights. Default:
            `load_components`.

    Raises:
        ModelNotFoundError: With what to do.
    """
    precision = precision_of(config.mixed_precision, accelerator.device)
    loaded = (load_components if load is None or config.is_full else load)(
        config.base_model,
        # Weights that train are float32; autocast computes with them in the precision.
        dtype=torch.float32 if config.is_full else PRECISION_DTYPES[precision],
    )
    if shards_model(accelerator):
        # The UNet comes to the device in parts.
        for module in (*loaded.text_encoders, loaded.vae):
            module.to(accelerator.device)
        return loaded
    return place_model(loaded, accelerator.device, config.offload)


def _reading(loaded: Components, config: TrainConfig) -> Components:
    """The model as the run reads captions with it."""
    reading = loaded.reading(config.clip_skip, config.max_token_length)
    if loaded.clip_skip != config.clip_skip and loaded.clip_skip:
        warnings.warn(
            f"{loaded.name} was trained with clip_skip {loaded.clip_skip}, this run has "
            f"{config.clip_skip}",
            stacklevel=2,
        )
    return reading


def _warn_of_small_data(
    config: TrainConfig, components: Components, dataset: DreamBoothDataset
) -> None:
    """Warn of limits that no caption, photo or sample comes to."""
    texts = {*dataset.captions, *(prompt.text for prompt in config.prompts)}
    sampled = [(p.width, p.height) for p in config.prompts if config.num_validation_images]
    sides = [s or components.default_resolution for size in sampled for s in size]
    longest = max(sides + [side for size in dataset.groups for side in size])
    is_asked = config.max_token_length != TOKENS_PER_CHUNK
    if is_asked and all(chunk_count(components, text) == 1 for text in texts):
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


def _resolution(config: TrainConfig, components: Components) -> int:
    """The run's resolution; where no subject is trained at it, the greatest of theirs."""
    sides = [s.resolution or components.default_resolution for s in config.subjects]
    is_own = all(subject.resolution for subject in config.subjects)
    return config.resolution or (max(sides) if is_own else components.default_resolution)


def _what_trains(
    config: TrainConfig, components: Components, start: StartingAdapter | None
) -> TrainedWeights:
    weights: TrainedWeights = (
        select_weights(components, config)
        if config.is_full
        else inject_trained(components, config, start)
    )
    weights = replace(weights, words=add_words(components, config, start.tokens if start else None))
    for name in weights.words.tables if not config.train_text_encoder else ():
        enter_training(components.adaptable()[name], components, config)
    return weights


def _load_step_modules(config: TrainConfig, components: Components) -> None:
    """Move to the device what every step computes with: the UNet, and encoders that train."""
    device = components.offload_to
    if device is None:
        return
    modules = [components.unet]
    if config.encodes_in_steps:
        modules += components.text_encoders
    if not config.cache_latents:
        modules.append(components.vae)
    for module in modules:
        move_frozen(module, device)


def _resolved(
    config: TrainConfig, components: Components, batches_per_epoch: int, precision: str
) -> TrainConfig:
    accumulation = config.gradient_accumulation_steps
    total_steps = config.max_train_steps or components.family.default_steps
    if config.max_train_steps is None and config.num_train_epochs is not None:
        total_steps = max(1, -(-config.num_train_epochs * batches_per_epoch // accumulation))
    return resolve(
        config,
        prediction_type=components.prediction_type,
        resolution=_resolution(config, components),
        total_steps=total_steps,
        steps_per_epoch=-(-batches_per_epoch // accumulation),
        mixed_precision=precision,
    )
