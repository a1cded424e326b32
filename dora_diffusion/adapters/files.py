"""Save a live adapter to one file, and put a file's adapter on live modules."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from dora_diffusion.adapters.inject import DEFAULT_NAME
from dora_diffusion.adapters.state import (
    LiveModules,
    LiveWeights,
    adapter_state,
    load_adapter_state,
)
from dora_diffusion.families import FAMILIES
from dora_diffusion.formats.adapter.embeddings import MissingToken
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    find_adapter,
    read_adapter,
    write_adapter,
)
from dora_diffusion.wording import listing


def save_adapter(
    components: nn.Module | LiveModules,
    path: str | Path,
    target: str = "diffusers",
    *,
    metadata: AdapterMetadata | None = None,
    name: str = DEFAULT_NAME,
) -> Path:
    """Write one adapter in the key format of a target.

    Args:
        components: ``{"unet": ..., "text_encoder": ...}``, or a UNet (or any module) alone.
        path: A ``.safetensors`` file, or a folder that gets the target's own file name.
        target: ``"diffusers"``, ``"kohya"``, ``"peft"``; see `write_adapter`.
        metadata: What to keep in the file, such as the trigger word.
        name: The adapter.

    Returns:
        The file that was written.

    Raises:
        ValueError: If there is no such adapter.
        AdapterFormatError: If the target cannot hold it, with what to use instead.

    Example:
        >>> import tempfile, torch
        >>> from dora_diffusion import AdapterConfig, inject_adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> report = inject_adapters(model, AdapterConfig(targets=("*",), rank=2))
        >>> save_adapter(model, tempfile.mkdtemp()).name
        'pytorch_lora_weights.safetensors'
    """
    layers = adapter_state(_as_components(components), name)
    return write_adapter(path, AdapterFile(layers, metadata or AdapterMetadata()), target)


def load_adapter(
    components: nn.Module | LiveModules,
    path: str | Path,
    *,
    name: str = DEFAULT_NAME,
    family: str = "",
    alpha: float | None = None,
) -> AdapterMetadata:
    """Read an adapter file and put it on the components as a new adapter.

    Args:
        components: As in `save_adapter`.
        path: A file in any known key format, or a folder that holds one.
        name: Name of the new adapter.
        family: Name of the model's `Family`, for the message if the adapter is for another.
        alpha: What it was trained with, for a file that does not say it.

    Returns:
        The file's metadata.

    Warns:
        UserWarning: Of an alpha that the file does not say, and of trained tokens in it.

    Raises:
        AdapterFormatError: If it cannot be read without guessing.
        ValueError: If it does not fit the components.

    Example:
        >>> import tempfile, torch
        >>> from dora_diffusion import AdapterConfig, inject_adapters, remove_adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> report = inject_adapters(model, AdapterConfig(targets=("*",), rank=2))
        >>> file = save_adapter(model, tempfile.mkdtemp())
        >>> remove_adapters(model)
        >>> load_adapter(model, file).format_version
        '1'
    """
    adapter = attach_file(_as_components(components), path, name=name, family=family, alpha=alpha)
    if adapter.tokens:
        warnings.warn(
            f"{find_adapter(path).name}: tokens were trained with it, {listing(adapter.tokens)}, "
            "which live modules alone cannot take up; load_adapted adds them to the tokenizer, and "
            "convert writes them to files",
            stacklevel=2,
        )
    return adapter.metadata


def attach_file(
    components: LiveModules,
    path: str | Path,
    *,
    name: str = DEFAULT_NAME,
    family: str = "",
    alpha: float | None = None,
) -> AdapterFile:
    """Do what `load_adapter` does, but for the file's trained tokens, which it returns."""
    adapter = read_adapter(path, LiveWeights(components, FAMILIES.get(family)), alpha=alpha)
    for assumption in adapter.assumptions:
        warnings.warn(
            f"{find_adapter(path).name}: {assumption}; if it was trained with another, give "
            "--alpha",
            stacklevel=3,
        )
    for note in adapter.notes:
        if isinstance(note, MissingToken):
            warnings.warn(f"{find_adapter(path).name}: {note}", stacklevel=3)
    load_adapter_state(components, adapter.layers, name=name)
    return adapter


def _as_components(components: nn.Module | LiveModules) -> LiveModules:
    return {"unet": components} if isinstance(components, nn.Module) else components
