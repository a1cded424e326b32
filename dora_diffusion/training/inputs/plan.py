"""Checks of a run in the order of their cost: settings, files, and the model without weights.

Settings check themselves when they are made (`TrainConfig`). All problems of a stage are reported
together.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dora_diffusion.adapters.inject import layers_to_adapt
from dora_diffusion.config import ConfigError, TrainConfig, unusual_rates, without_effect
from dora_diffusion.config.exclusions import refuse
from dora_diffusion.config.families import Family
from dora_diffusion.config.images import near_side
from dora_diffusion.config.problems import Problems
from dora_diffusion.config.wording import quoted
from dora_diffusion.models.components import Components
from dora_diffusion.models.locate import known_family
from dora_diffusion.models.precision import precision_of
from dora_diffusion.training.features.code import Validate, code_of
from dora_diffusion.training.inputs.dataset import list_subjects
from dora_diffusion.training.inputs.subject import Subject, outside_toy_world, subjects_of
from dora_diffusion.training.optimizer import optimizer_library
from dora_diffusion.training.results.folders import check_folders
from dora_diffusion.training.trainable.adapters import (
    StartingAdapter,
    adapter_configs,
    components_that_train,
    matched,
)


class RunPlan(NamedTuple):
    """Settings and inputs of a run that are known before its model is loaded.

    Attributes:
        config: Settings, with the precision resolved.
        subjects: The subjects.
        photos: Photos of each subject to train on.
        held_out: Photos of each subject to validate on.
        validate: Opens the validation of the run; None: it has none.
        start: Adapter that the run starts from, or None.
    """

    config: TrainConfig
    subjects: list[Subject]
    photos: list[list[Path]]
    held_out: list[list[Path]]
    validate: Validate | None
    start: StartingAdapter | None


def plan_run(config: TrainConfig) -> RunPlan:
    """Check the settings and the files of a run without loading its model.

    Raises:
        ConfigError, PhotoError, AdapterFormatError, HubError: If they are not valid; several
            problems of the settings, or of the files, are one `ConfigError`.

    Warns:
        UserWarning: For settings without effect and for subjects that the base model cannot learn.
    """
    problems, subjects = Problems(ValueError), list[Subject]()
    base = config.pretrained_model_name_or_path
    family = known_family(config.base_model)
    with problems.collect():
        config = config.with_sample_prompts()
    with problems.collect():
        subjects = subjects_of(config)
    with problems.collect():
        optimizer_library(config.optimizer)
    with problems.collect():
        if family is not None:
            refuse(config, family, base)
    with problems.collect():
        if config.push_to_hub:
            from dora_diffusion.export import hub

            hub.check(config.hub_model_id or "")
    problems.raise_all()
    _warn(config, subjects, family)
    start, validate, photos, held_out = None, None, list[list[Path]](), [list[Path]()]
    with problems.collect():
        check_folders(config)
    with problems.collect():
        start = StartingAdapter.of(config)
    with problems.collect():
        photos = list_subjects(subjects)
        held_out = [[] for _ in subjects]
        for one in code_of(config):
            if divided := one.hold_out(subjects, photos):
                photos, held_out, validate = divided
    problems.raise_all()
    config = replace(config, mixed_precision=precision_of(config.mixed_precision))
    return RunPlan(config, subjects, photos, held_out, validate, start)


def _warn(config: TrainConfig, subjects: Sequence[Subject], family: Family | None) -> None:
    """Warn of settings without effect, and of subjects that the base model cannot learn."""
    inactive = without_effect(config, family=family).values()
    for reason in (*inactive, *unusual_rates(config)):
        warnings.warn(reason, stacklevel=3)
    base, words = config.pretrained_model_name_or_path, [s.class_word for s in subjects]
    if toy := next(filter(None, (outside_toy_world(base, word) for word in words)), ""):
        warnings.warn(f"{toy} Name another pretrained_model_name_or_path.", stacklevel=3)


def check_with_model(
    components: Components, config: TrainConfig, start: StartingAdapter | None = None
) -> StartingAdapter | None:
    """Check features, layers and sizes of samples with the model, which needs no weights.

    Args:
        components: The model.
        config: Settings.
        start: Adapter that the run starts from, or None.

    Returns:
        The adapter with its weights.

    Raises:
        ConfigError, AdapterFormatError, TargetError, ValueError: If the model cannot train a
            feature, a target matches no layer, a rank exceeds a layer, the run cannot start from
            its adapter, or the model cannot generate a sample of a size.
    """
    problems = Problems(ValueError)
    with problems.collect():
        for one in code_of(config):
            one.check_model(components)
    with problems.collect():
        _check_sizes(components, config)
    with problems.collect():
        _check_layers(components, config)
        start = start.read(components, config) if start else None
    problems.raise_all()
    return start


def _check_sizes(components: Components, config: TrainConfig) -> None:
    step = components.size_step
    for prompt in config.prompts if config.num_validation_images else ():
        for name, side in (("width", prompt.width or 0), ("height", prompt.height or 0)):
            if side % step:
                raise ConfigError(
                    f"{name} {side} of the sample prompt {quoted(prompt.prompt)} must be a "
                    f"multiple of {step} on {components.family.title}, such as "
                    f"{near_side(side, step)}",
                    "validation_prompt",
                )


def _check_layers(components: Components, config: TrainConfig) -> None:
    modules = components_that_train(components, config)
    if config.trains_adapters:
        for name, adapter in adapter_configs(modules, config).items():
            layers_to_adapt(modules[name], adapter)
    elif config.uses("targets"):
        for name, model in modules.items():
            matched(name, model, config)
