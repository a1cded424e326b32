"""Live modules <-> the canonical tensors that files hold.

Canonical names are ``unet.<path>``, ``text_encoder.text_model.<path>`` and
``text_encoder_2.text_model.<path>``. Transformers 5.6 dropped the ``text_model`` level from
CLIPTextModel and kept it in CLIPTextModelWithProjection; names on disk always have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from dora_diffusion.adapters.inject import DEFAULT_NAME, put_adapters
from dora_diffusion.adapters.layers import LayerAdapter, adapted_layers
from dora_diffusion.formats.names.modules import with_text_model
from dora_diffusion.numerics.weights import LayerWeights

_TEXT_LEVEL = "text_model."


def _on_disk(component: str, path: str) -> str:
    if component.startswith("text_encoder"):
        path = with_text_model(path)  # but the projection, which lies beside that level
    return f"{component}.{path}"


def _in_model(component: str, name: str, model: nn.Module) -> str:
    path = name.removeprefix(f"{component}.")
    if component.startswith("text_encoder") and not hasattr(model, "text_model"):
        path = path.removeprefix(_TEXT_LEVEL)
    return path


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
        _on_disk(component, path): _detached(cast(LayerAdapter, layer.adapters[name]))
        for component, model in components.items()
        for path, layer in adapted_layers(model)
        if name in layer.adapters
    }
    if not state:
        raise ValueError(f"no component has an adapter named {name!r}")
    return state


def _detached(adapter: LayerAdapter) -> LayerWeights:
    def copy(tensor: nn.Parameter) -> nn.Parameter:
        return cast(nn.Parameter, tensor.detach().to("cpu", copy=True))

    weights = adapter.weights()
    return LayerWeights(
        copy(adapter.down),
        copy(adapter.up),
        None if adapter.magnitude is None else copy(adapter.magnitude),
        weights.alpha,
        weights.norm_axis,
    )


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
        component = key.partition(".")[0]
        if component in split:
            path = _in_model(component, key, components[component])
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
    from dora_diffusion.adapters.layers import can_adapt

    return {
        _on_disk(component, path): tuple(cast(nn.Linear, module).weight.shape)
        for component, model in components.items()
        for path, module in model.named_modules()
        if path and can_adapt(module)
    }
