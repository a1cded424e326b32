"""Conversion between adapters on live modules and canonical tensors, and saving and loading.

Canonical names are ``unet.<path>``, ``text_encoder.text_model.<path>`` and
``text_encoder_2.text_model.<path>``. Transformers 5.6 dropped the ``text_model`` level from
CLIPTextModel but kept it in CLIPTextModelWithProjection; canonical names always have it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.inject import DEFAULT_NAME, attach_adapters
from dora_diffusion.adapters.kinds import can_adapt, layer_kind
from dora_diffusion.adapters.layers import LayerAdapter, adapted_layers, own_modules
from dora_diffusion.config.families import FAMILIES, Family
from dora_diffusion.config.wording import listing
from dora_diffusion.formats.adapter.embeddings import MissingToken, UnreadFile
from dora_diffusion.formats.adapter.file import AdapterFile, read_adapter, write_adapter
from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.formats.adapter.stored import find_adapter
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.names.modules import canonical, installed_path, is_flat
from dora_diffusion.numerics.weights import LayerWeights

if TYPE_CHECKING:
    from dora_diffusion.formats.layouts.vera import VeraLayer

LiveModules = Mapping[str, nn.Module]


class LiveWeights:
    """Base weights of live modules that can be adapted, on the CPU. Implements `ModelWeights`.

    Attributes:
        components: ``{"unet": ..., "text_encoder": ...}``.
        family: Family of the model; None if unknown.
        specs: Stored dtype and shape of each weight, by canonical name.
        kinds: How each module stores its weight, by canonical name.
    """

    def __init__(self, components: LiveModules, family: Family | None = None) -> None:
        self.components, self.family = components, family
        modules = {
            canonical(component, path): module
            for component, model in components.items()
            for path, module in own_modules(model)
            if path and can_adapt(module)
        }
        self.kinds = {name: layer_kind(module) for name, module in modules.items()}
        self._weights = {
            f"{name}.weight": cast(nn.Linear, module).weight for name, module in modules.items()
        }
        self.specs = {name: TensorSpec.of(weight) for name, weight in self._weights.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name].detach().cpu()


def adapter_state(components: LiveModules, name: str = DEFAULT_NAME) -> dict[str, LayerWeights]:
    """Return detached copies of one adapter's weights on the CPU, by canonical name.

    Args:
        components: ``{"unet": ..., "text_encoder": ...}``.
        name: The adapter.

    Raises:
        ValueError: If no component has this adapter.
    """
    with torch.no_grad():
        state = {
            key: adapter.used_weights().to("cpu", copy=True)
            for key, adapter in _adapters(components, name)
        }
    if not state:
        raise ValueError(f"no component has an adapter named {name!r}")
    return state


def vera_state(components: LiveModules) -> dict[str, VeraLayer]:
    """Return copies of the vectors of a VeRA or DVoRA, by canonical name; {} for other adapters."""
    state = {}
    for key, adapter in _adapters(components, DEFAULT_NAME):
        if adapter.parametrization is None:
            continue
        from dora_diffusion.adapters.parametrizations import ProjectedParametrization
        from dora_diffusion.formats.layouts.vera import VeraLayer

        if isinstance(parametrization := adapter.parametrization, ProjectedParametrization):
            tensors = (adapter.down, adapter.up, adapter.magnitude)
            d, b, m = (None if t is None else t.detach().to("cpu", copy=True) for t in tensors)
            assert d is not None
            assert b is not None
            axis = adapter.norm_axis
            state[key] = VeraLayer(
                parametrization.projections, parametrization.weight_shape, d, b, m, axis
            )
    return state


def _adapters(components: LiveModules, name: str) -> Iterator[tuple[str, LayerAdapter]]:
    """Yield the `LayerAdapter` of each layer for one adapter, with its canonical name."""
    for component, model in components.items():
        for path, layer in adapted_layers(model):
            if name in layer.adapters:
                yield canonical(component, path), cast(LayerAdapter, layer.adapters[name])


def load_adapter_state(
    components: LiveModules,
    state: Mapping[str, LayerWeights],
    *,
    name: str = DEFAULT_NAME,
) -> None:
    """Load canonical tensors into the components' layers as a new adapter.

    Raises:
        ValueError: If a component or a layer of the state is missing, or its shape differs.
    """
    for component, layers in by_component(components, state).items():
        attach_adapters(components[component], layers, name=name)


def by_component(
    components: LiveModules, state: Mapping[str, LayerWeights]
) -> dict[str, dict[str, LayerWeights]]:
    """Split canonical layers by component; in each component they are keyed by module path.

    Raises:
        ValueError: If the state has layers of a component that is not given.
    """
    split: dict[str, dict[str, LayerWeights]] = {component: {} for component in components}
    unexpected = []
    for key, weights in state.items():
        component = key.partition(".")[0]
        if component in split:
            path = installed_path(key, flat=is_flat(components[component]))
            split[component][path] = weights
        else:
            unexpected.append(key)
    if unexpected:
        raise ValueError(
            f"the adapter has {len(unexpected)} layers of components that the model lacks, "
            f"such as {unexpected[0]}"
        )
    return split


def save_adapter(
    components: nn.Module | LiveModules,
    path: str | PathLike[str],
    target: str = "diffusers",
    *,
    metadata: AdapterMetadata | None = None,
    name: str = DEFAULT_NAME,
) -> Path:
    """Write one adapter in the key format of a target.

    Args:
        components: ``{"unet": ..., "text_encoder": ...}``, or a UNet (or any module) alone.
        path: A ``.safetensors`` file, or a folder. In a folder the file gets the target's default
            name.
        target: ``"diffusers"``, ``"kohya"``, ``"peft"``; see `write_adapter`.
        metadata: Metadata to store in the file, such as the trigger word.
        name: The adapter.

    Returns:
        Path of the written file.

    Raises:
        ValueError: If no component has an adapter of this name.
        AdapterFormatError: If the target cannot store the adapter; names an alternative.

    Example:
        >>> import tempfile, torch
        >>> from dora_diffusion import AdapterConfig, inject_adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> report = inject_adapters(model, AdapterConfig(targets=("*",), rank=2))
        >>> save_adapter(model, tempfile.mkdtemp()).name
        'pytorch_lora_weights.safetensors'
    """
    layers = adapter_state(_as_components(components), name)
    return write_adapter(Path(path), AdapterFile(layers, metadata or AdapterMetadata()), target)


def load_adapter(
    components: nn.Module | LiveModules,
    path: str | PathLike[str],
    *,
    name: str = DEFAULT_NAME,
    family: str = "",
    alpha: float | None = None,
) -> AdapterMetadata:
    """Read an adapter file and attach it to the components as a new adapter.

    Args:
        components: As in `save_adapter`.
        path: A file in any known key format, or a folder that contains one.
        name: Name of the new adapter.
        family: Name of the model's `Family`, for the message if the adapter is for another.
        alpha: Alpha of the training run, for a file that does not store it.

    Returns:
        The file's metadata.

    Warns:
        UserWarning: If the file does not store its alpha, or contains trained tokens.

    Raises:
        AdapterFormatError: If the file cannot be read without guessing.
        ValueError: If the adapter does not fit the components.

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
    path = Path(path)
    adapter = attach_file(_as_components(components), path, name=name, family=family, alpha=alpha)
    if adapter.tokens:
        warnings.warn(
            f"{find_adapter(path).name}: tokens were trained with it, {listing(adapter.tokens)}, "
            "which live modules alone cannot load; load_adapted adds them to the tokenizer, and "
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
    """Load an adapter like `load_adapter`, and return its file with the trained tokens."""
    adapter = read_for(components, path, "give --alpha", family=family, alpha=alpha)
    load_adapter_state(components, adapter.layers, name=name)
    return adapter


def read_for(
    components: LiveModules,
    path: str | Path,
    remedy: str,
    *,
    family: str = "",
    alpha: float | None = None,
) -> AdapterFile:
    """Read an adapter file for live modules.

    Args:
        components: As in `save_adapter`.
        path: The file or folder.
        remedy: Advice for the warning about an assumed alpha.
        family: Name of the model's `Family`.
        alpha: As in `load_adapter`.
    """
    adapter = read_adapter(path, LiveWeights(components, FAMILIES.get(family)), alpha=alpha)
    for assumption in adapter.assumptions:
        warnings.warn(
            f"{find_adapter(path).name}: {assumption}; if it was trained with another, {remedy}",
            stacklevel=4,
        )
    for note in adapter.notes:
        if isinstance(note, (MissingToken, UnreadFile)):
            warnings.warn(f"{find_adapter(path).name}: {note}", stacklevel=4)
    return adapter


def _as_components(components: nn.Module | LiveModules) -> LiveModules:
    return {"unet": components} if isinstance(components, nn.Module) else components
