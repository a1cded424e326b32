"""Base model of a run: loading, placement on devices, clip skip and prompt length."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.derived import changed_settings
from dora_diffusion.config.exclusions import refuse
from dora_diffusion.models.components import Components
from dora_diffusion.models.load import load_components
from dora_diffusion.models.locate import known_family
from dora_diffusion.models.offload import move_frozen, place_model
from dora_diffusion.models.precision import PRECISION_DTYPES, precision_of
from dora_diffusion.sampling.load import few_steps
from dora_diffusion.training.processes import shards_model

LoadBase = Callable[..., Components]
"""Function that loads a model: `load_components` or a `BaseCache`."""


def load_base(config: TrainConfig, accelerator: Any, load: LoadBase | None = None) -> Components:
    """Load the base model of a run and place it on the devices.

    Args:
        config: Settings.
        accelerator: Devices and processes (`make_accelerator`).
        load: Loads the model for adapters, which do not write to the base weights. Default:
            `load_components`.

    Raises:
        ModelNotFoundError: If the model does not exist.
    """
    precision = precision_of(config.mixed_precision, accelerator.device)
    loaded = (load if load and config.trains_adapters else load_components)(
        config.base_model,
        # Trained weights are float32; autocast computes in the configured precision.
        dtype=PRECISION_DTYPES[precision] if config.trains_adapters else torch.float32,
    )
    if not shards_model(accelerator):
        return place_model(loaded, accelerator.device, config.offload)
    for module in (*loaded.text_encoders, loaded.vae):  # The denoiser is moved block by block.
        module.to(accelerator.device)
    return loaded


def configure_reading(loaded: Components, config: TrainConfig) -> Components:
    """Set clip skip and prompt length, and check settings for a family that was not known before.

    Raises:
        ConfigError: If the family refuses a setting.

    Warns:
        UserWarning: If a setting has no effect on the family, or the model was trained with another
            clip skip, or distilled to few steps.
    """
    if known_family(config.base_model) is None:
        refuse(config, loaded.family, loaded.name)
        for message in loaded.family.inactive(changed_settings(config)).values():
            warnings.warn(message, stacklevel=2)
    if (few := few_steps(loaded)) and not config.assistant_adapter:
        name, (kind, *_) = few
        warnings.warn(
            f"{name} was distilled to few denoising steps ({kind}), which training may undo; train "
            f"on a model that was not distilled, such as {loaded.family.released_id}, with "
            f"sample_model {name}; or set assistant_adapter",
            stacklevel=2,
        )
    components = loaded.reading(config.clip_skip, config.max_token_length)
    if loaded.clip_skip != config.clip_skip and loaded.clip_skip:
        warnings.warn(
            f"{loaded.name} was trained with clip_skip {loaded.clip_skip}, but this run has "
            f"clip_skip {config.clip_skip}",
            stacklevel=2,
        )
    return components


def move_step_modules(config: TrainConfig, components: Components) -> None:
    """Move the modules of an offloaded model that training steps use to the device."""
    device = components.offload_to
    if device is None:
        return
    modules = [components.denoiser]
    if config.describe().encodes_in_steps:
        modules += components.text_encoders
    if not config.cache_latents:
        modules.append(components.vae)
    for module in modules:
        move_frozen(module, device)
