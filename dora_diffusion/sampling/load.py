"""A base model with adapters on it, ready to sample from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dora_diffusion.adapters.compiled import compile_blocks, require_compiler
from dora_diffusion.config.base import AnyModel
from dora_diffusion.config.families import Family
from dora_diffusion.config.fields import TOKENS_PER_CHUNK
from dora_diffusion.config.images import SAMPLES
from dora_diffusion.config.schedulers import FewSteps, few_steps_of, few_steps_of_name
from dora_diffusion.formats.adapter.metadata import READING, AdapterMetadata, stated_reading
from dora_diffusion.formats.adapter.stored import read_metadata
from dora_diffusion.models.components import Components
from dora_diffusion.models.load import load_components
from dora_diffusion.models.memory import auto_precision, describe_device
from dora_diffusion.models.offload import place_model
from dora_diffusion.models.precision import PRECISION_DTYPES, require_computes
from dora_diffusion.numerics.devices import default_device
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.sampling.stack import AdapterUse, attach_stack


def load_adapted(  # noqa: PLR0913 - keywords, each documented
    base: AnyModel,
    adapter: str | Path | Sequence[AdapterUse] | None = None,
    *,
    strength: float | Strengths = 1.0,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    compile: bool = False,
    offload: str = "none",
    clip_skip: int | None = None,
    max_token_length: int | None = None,
) -> tuple[Components, AdapterMetadata]:
    """Load a base model with an adapter and its trained tokens on it, ready to sample from.

    Args:
        base: A model as `load_components` takes it.
        adapter: An adapter file or the output folder of a run; several with their strengths
            (`attach_stack`); None samples the base.
        strength: 0 is exactly the base, 1 exactly the adapter; or all of its `Strengths`. Of
            several each has its own.
        alpha: Alpha that the adapter was trained with, for a file that does not state it.
        dtype: Dtype of the base; an adapter always computes its norms in float32.
        device: None is the accelerator where there is one, else the CPU.
        compile: Compile the UNet's repeated blocks when they first run (`compile_blocks`).
        offload: ``"model"`` has each part on the device only while it computes (`generate_images`).
        clip_skip: Last layers of the text encoders to leave out; None: what adapter or base say.
        max_token_length: Tokens of a prompt that are read; None: what adapter or base say.

    Returns:
        The model, and the adapter's metadata, such as its trigger words; for several adapters the
        metadata in which they agree, with all trigger words.

    Raises:
        ModelNotFoundError, UnsupportedModelError: If the base cannot be loaded.
        AdapterFormatError, ValueError: If the adapter cannot be read, or does not fit.
        ConfigError: If the device does not compute so, or nothing compiles for it.

    Warns:
        UserWarning: For each setting without effect on the model.
    """
    device = default_device() if device is None else device
    require_computes(device, dtype)
    if compile:
        require_compiler(device)
    if isinstance(adapter, str | Path):
        adapter = [AdapterUse(adapter, Strengths.of(strength))]
    uses = adapter or ()
    facts = [read_metadata(use.path) for use in uses]
    loaded = load_components(base, dtype=dtype, adapters=facts)
    _warn_of_settings(loaded, clip_skip, max_token_length)
    components = place_model(loaded.reading(clip_skip, max_token_length), device, offload)
    if compile:
        compile_blocks(components.denoiser)
    if not uses:
        return components, AdapterMetadata()
    metadata = attach_stack(components, uses, alpha)
    for model in components.adaptable().values():
        model.eval()
    return as_stated(components, metadata, clip_skip, max_token_length), metadata


def _warn_of_settings(
    components: Components, clip_skip: int | None, max_token_length: int | None
) -> None:
    """Warn of settings of the model without effect."""
    length = max_token_length if max_token_length != TOKENS_PER_CHUNK else None
    given = {"clip_skip": clip_skip, "max_token_length": length, **vars(components.asked)}
    for line in components.family.inactive([name for name in given if given[name]]).values():
        warnings.warn(line, stacklevel=3)


def load_model(base: AnyModel, adapter: Path | Sequence[AdapterUse] | None) -> Components:
    """A model to sample from as a run loaded it, in half precision on a GPU.

    Raises:
        ValueError: If a part of it cannot be had.
    """
    dtype = PRECISION_DTYPES[auto_precision(describe_device())]
    return load_adapted(base, adapter, dtype=dtype)[0]


def as_stated(components: Components, metadata: AdapterMetadata, *given: int | None) -> Components:
    """The model, reading prompts as an adapter's file says where nothing else is given.

    Args:
        components: The model.
        metadata: The file's.
        given: Clip skip and length of prompts.
    """
    stated = stated_reading(metadata.extra)
    pairs = zip(READING, given, strict=True)
    left = (stated.get(name) if value is None else None for name, value in pairs)
    return components.reading(*left, is_told=False)


def few_steps(components: Components, adapters: Sequence[str] = ()) -> tuple[str, FewSteps] | None:
    """Find an adapter or a model that was distilled to few denoising steps (LCM, Turbo, Lightning).

    Args:
        components: The model: its scheduler, its UNet and its name may show it.
        adapters: Names of the adapters on it (`RecordedAdapter.name`), which come first.

    Returns:
        The name of what shows it, and the settings of sampling that it needs; None where nothing
        does.
    """
    for name in adapters:
        if few := few_steps_of_name(name):
            return name, few
    if components.asked and components.asked.distilled is False:
        return None
    is_input = bool(components.denoiser.config.get("time_cond_proj_dim"))
    few = few_steps_of(components.name, components.scheduler_config, guidance_is_input=is_input)
    if few is None and components.family.is_distilled:
        few = FewSteps("distilled", **_family_defaults(components.family))
    return few and (components.name, few)


def sampling_defaults(components: Components) -> dict[str, Any]:
    """Return the settings of a model's images that differ from the defaults of `SamplingSettings`.

    Returns:
        Steps, guidance scale and scheduler, as far as a distilled model or the family has others.
    """
    if few := few_steps(components):
        names = ("steps", "guidance_scale", "scheduler")
        return {name: value for name in names if (value := getattr(few[1], name)) is not None}
    return _family_defaults(components.family)


def _family_defaults(family: Family) -> dict[str, Any]:
    return {n: family.defaults[name] for n, name in SAMPLES.items() if name in family.defaults}
