"""Live modules <-> the canonical tensors that files hold.

Canonical names are ``unet.<path>``, ``text_encoder.text_model.<path>`` and
``text_encoder_2.text_model.<path>``. Transformers 5.6 dropped the ``text_model`` level from
CLIPTextModel and kept it in CLIPTextModelWithProjection; names on disk always have it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from dora_diffusion.adapters.inject import DEFAULT_NAME, put_adapters
from dora_diffusion.adapters.layer_adapter import LayerAdapter
from dora_diffusion.adapters.layers import adapted_layers, can_adapt
from dora_diffusion.formats.names.modules import canonical
from dora_diffusion.numerics.weights import LayerWeights


def path_in(components: Mapping[str, nn.Module], name: str) -> tuple[str, str]:
    """The component, and the module's path in its live model, of a canonical name."""
    component, _, path = name.partition(".")
    is_text = component.startswith("text_encoder")
    if is_text and not hasattr(components.get(component), "text_model"):
        path = path.removeprefix("text_model.")
    return component, path


def adapter_state(
    components: Mapping[str, nn.Module], name: str = DEFAULT_NAME
) -> dict[str, LayerWeights]:
    """One adapter of a pipeline's components as detached copies on the CPU, by canonical name.

    Args:
        components: ``{"unet": ..., "text_encoder": ...}``.
        name: The adapter.

    Raises:
        ValueError: If no component has this adapter.
    """
    state = {
        canonical(component, path): _detached(cast(LayerAdapter, layer.adapters[name]))
        for component, model in components.items()
        for path, layer in adapted_layers(model)
        if name in layer.adapters
    }
    if not state:
        raise ValueError(f"no component has an adapter named {name!r}")
    return state


def _detached(adapter: LayerAdapter) -> LayerWeights:
    copies: dict[str, Any] = {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in adapter.named_parameters()
    }
    return dataclasses.replace(adapter.weights(), **copies)


def load_adapter_state(
    components: Mapping[str, nn.Module],
    state: Mapping[str, LayerWeights],
    *,
    name: str = DEFAULT_NAME,
) -> None:
    """Put canonical tensors on the components' layers as a new adapter.

    Raises:
        ValueError: If the state has layers of a component that is not given, or that a component
            lacks, or of another shape.
    """
    split: dict[str, dict[str, LayerWeights]] = {component: {} for component in components}
    strangers = []
    for key, weights in state.items():
        component, path = path_in(components, key)
        if component in split:
            split[component][path] = weights
        else:
            strangers.append(key)
    if strangers:
        raise ValueError(
            f"the adapter has {len(strangers)} layers of components that the model lacks, "
            f"such as {strangers[0]}"
        )
    for component, layers in split.items():
        put_adapters(components[component], layers, name=name)


def module_shapes(components: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Canonical name -> weight shape of every layer that could be adapted."""
    return {
        canonical(component, path): tuple(cast(nn.Linear, module).weight.shape)
        for component, model in components.items()
        for path, module in model.named_modules()
        if path and can_adapt(module)
    }
