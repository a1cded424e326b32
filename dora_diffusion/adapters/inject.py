"""Attach adapters to a model, detach, switch and merge them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from dora_diffusion.adapters.fresh import (
    InjectionReport,
    check_rank,
    check_start,
    fresh_adapters,
)
from dora_diffusion.adapters.kinds import (
    adapt_layer,
    layer_groups,
    layer_kind,
    layer_matrix,
    obstacle,
    restore_base_class,
)
from dora_diffusion.adapters.layers import (
    AdaptedLayer,
    LayerAdapter,
    adapted_layers,
    own_modules,
)
from dora_diffusion.adapters.layout import layout_order
from dora_diffusion.adapters.site import Site
from dora_diffusion.adapters.targets import check_pattern, match_targets
from dora_diffusion.config import AdapterConfig
from dora_diffusion.config.adapter import PATTERNS
from dora_diffusion.config.fields import require
from dora_diffusion.config.wording import listing
from dora_diffusion.numerics.threads import map_ahead
from dora_diffusion.numerics.weights import LayerWeights, Strengths

DEFAULT_NAME = "default"


def inject_adapters(
    model: nn.Module,
    config: AdapterConfig,
    *,
    name: str = DEFAULT_NAME,
    generator: torch.Generator | None = None,
    start: Mapping[str, LayerWeights] | None = None,
) -> InjectionReport:
    """Freeze the model and put a fresh adapter on the layers that the config names.

    A fresh adapter changes nothing, to the last bit. Open a `scope.norm_scope` around each step of
    training: without one, every call of a layer recomputes its norm.

    Args:
        model: Any module tree with layers that can carry adapters (`adapters.kinds`). It is frozen
            and changed in place.
        config: Targets, ranks and norm axis.
        name: Name of the adapter. A model can have several.
        generator: Draws A. None uses the global one.
        start: Another adapter's weights to start from, by path: `adapters.state.by_component`.

    Raises:
        TargetError: If a target matches no layer.
        ValueError: If a rank is larger than a layer, the model already has an adapter of this name,
            or an adapter of this config cannot start from the other's weights.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.GELU())
        >>> print(inject_adapters(model, AdapterConfig(targets=("*",), rank=2)))
        1 layer adapted (1 Linear), 34 parameters
    """
    adapters = fresh_adapters(layers_to_adapt(model, config, start), config, generator, start)
    _attach(model, adapters, name)
    return InjectionReport.of(adapters)


def layers_to_adapt(
    model: nn.Module, config: AdapterConfig, start: Mapping[str, LayerWeights] | None = None
) -> dict[str, nn.Module]:
    """Return the layers that `inject_adapters` would adapt, by path, after the same checks.

    Raises:
        TargetError, ValueError: As in `inject_adapters`.
    """
    modules = {path: model.get_submodule(path) for path in match_targets(model, config.targets)}
    for setting in PATTERNS:
        check_pattern(setting, getattr(config, setting), [modules])
    for path, module in modules.items():
        check_rank(path, module, config)
    if start:
        check_start(modules, config, start)
    return modules


def attach_adapters(model: nn.Module, weights: Mapping[str, LayerWeights], *, name: str) -> None:
    """Freeze the model and attach adapters with these weights to its layers, by path.

    Each adapter is moved to the device of its layer.

    Raises:
        ValueError: If the model lacks a layer, shapes differ, or the name is taken. The message
            lists all problems, and the model is unchanged.
    """
    _attach(model, {path: LayerAdapter(layer) for path, layer in weights.items()}, name)


@dataclass(frozen=True)
class AdapterSet:
    """All adapters of some models. A model can have one set attached at a time.

    Attributes:
        layers: Each layer with its adapters, and with its ``keep_output``.
    """

    layers: Sequence[tuple[AdaptedLayer, nn.ModuleDict, bool]]

    @classmethod
    def of(cls, *models: nn.Module) -> AdapterSet:
        """Return the set of adapters that are attached to models."""
        layers = [layer for model in models for _, layer in adapted_layers(model)]
        return cls([(layer, layer.adapters, layer.keep_output) for layer in layers])

    def trained(self) -> list[LayerAdapter]:
        """Return the trained adapter of each layer."""
        return [cast(LayerAdapter, adapters[DEFAULT_NAME]) for _, adapters, _ in self.layers]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the trained adapters, in the order of their layouts."""
        adapters = self.trained()
        sites = [
            Site(layer.dense(local=True), None, [adapter.weights()], shard=layer.shard)
            for (layer, _, _), adapter in zip(self.layers, adapters, strict=True)
        ]
        in_order = (adapters[number] for number in layout_order(sites))
        return [parameter for adapter in in_order for parameter in adapter.parameters()]

    def attach(self) -> None:
        """Attach the adapters to their layers, in place of the attached ones."""
        for module, adapters, keep_output in self.layers:
            layer = adapt_layer(module, keep_output)
            layer._modules["adapters"] = adapters

    def detach(self) -> None:
        """Detach the adapters from their layers, which get their plain class back."""
        for layer, _, _ in self.layers:
            restore_base_class(layer)


def _attach(model: nn.Module, adapters: Mapping[str, LayerAdapter], name: str) -> None:
    require(
        bool(name) and "." not in name,
        f"name is {name!r}; it must be a text without dots, and not empty",
        "name",
    )
    reasons = [_mismatch_reason(model, path, part, name) for path, part in adapters.items()]
    if problems := [reason for reason in reasons if reason]:
        raise ValueError("the adapter does not fit the model: " + "; ".join(problems))
    modules = [module for _, module in own_modules(model)]
    for parameter in (p for module in modules for p in module.parameters(recurse=False)):
        parameter.requires_grad_(False)
    # An activation such as ``ReLU(inplace=True)`` may overwrite a layer's output.
    keep_output = not any(getattr(module, "inplace", False) is True for module in modules)
    for path, adapter in adapters.items():
        layer = adapt_layer(model.get_submodule(path), keep_output)
        # The module knows how it stores its weight; a file may not.
        adapter.kind, adapter.groups = layer.kind, layer_groups(layer)
        layer.adapters[name] = adapter.to(layer.weight.device)
        if layer.route is not None:
            layer.route.forget(name)
        adapter.train(layer.training)


def _mismatch_reason(model: nn.Module, path: str, adapter: LayerAdapter, name: str) -> str | None:
    """Return why the adapter does not fit the layer at this path; None if it fits."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return f"the model has no layer {path}"
    if reason := obstacle(module):
        return f"{path} is a {reason}"
    if adapter.kind == "embedding" != layer_kind(module):
        return f"{path} is a {type(module).__name__}, the adapter is for an Embedding"
    shape = tuple(layer_matrix(module).shape)
    if (adapter_shape := adapter.weights().weight_shape) != shape:
        return f"{path} has shape {shape}, the adapter's is {adapter_shape}"
    if isinstance(module, AdaptedLayer) and name in module.adapters:
        return f"{path} already has an adapter named {name!r}; remove it first"
    return None


def check_fit(model: nn.Module, other: nn.Module) -> None:
    """Check that the trained adapter of a model fits another model, which needs no weights.

    Raises:
        ValueError: If the other model lacks a layer, or shapes differ.
    """
    parts = {path: layer.adapters[DEFAULT_NAME] for path, layer in adapted_layers(model)}
    reasons = (_mismatch_reason(other, p, cast(LayerAdapter, a), "") for p, a in parts.items())
    if problems := [reason for reason in reasons if reason]:
        raise ValueError(f"the adapter does not fit it: {listing(problems, 3)}")


def remove_adapters(model: nn.Module, name: str | None = None) -> None:
    """Remove one adapter (or all), and give layers without adapters their plain class back.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> report = inject_adapters(model, AdapterConfig(targets=("*",), rank=2))
        >>> remove_adapters(model); type(model[0]).__name__
        'Linear'

    Raises:
        ValueError: If no layer has an adapter of this name.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if name is not None and not any(name in layer.adapters for layer in layers):
        raise ValueError(f"the model has no adapter named {name!r}")
    for layer in layers:
        layer.unmerge()
        for key in [key for key in layer.adapters if name in (None, key)]:
            del layer.adapters[key]
        if not layer.adapters:
            restore_base_class(layer)


def merge_adapters(model: nn.Module, *, keep_base: bool = False) -> None:
    """Write the active adapters into the weights, in float32, cast once.

    Args:
        model: A model with adapters.
        keep_base: Keep the adapters and a copy of the base weights, so that `unmerge_adapters`
            restores them bit for bit. False drops both.

    Raises:
        ValueError: If a weight is quantised. No weight is written then.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> report = inject_adapters(model, AdapterConfig(targets=("*",), rank=2))
        >>> merge_adapters(model); type(model[0]).__name__
        'Linear'
    """
    from dora_diffusion.numerics.quantised import PackedWeight

    layers = [layer for _, layer in adapted_layers(model)]
    if any(isinstance(layer.weight, PackedWeight) for layer in layers):
        raise ValueError(
            "the model is quantised, and an update would be lost in its rounding; load it "
            "unquantised, or merge into its files with 'dora-diffusion export --base MODEL "
            "--adapter ADAPTER --output MERGED'"
        )

    def merged(layer: AdaptedLayer) -> torch.Tensor | None:
        return None if layer.is_merged else layer.merged()

    # Merging ahead in a thread is for distinct weights on the CPU: a new thread uses the default
    # CUDA stream, and a weight that two layers share is merged twice, in order.
    weights = {layer.weight.data_ptr() for layer in layers if layer.weight.device.type == "cpu"}
    is_ahead = len(weights) == len(layers)
    results = map_ahead(merged, layers) if is_ahead else ((a, merged(a)) for a in layers)
    for layer, weight in results:
        if weight is not None:
            layer.merge(weight)
        if not keep_base:
            restore_base_class(layer)


def unmerge_adapters(model: nn.Module) -> None:
    """Restore the base weights that ``merge_adapters(keep_base=True)`` replaced.

    Raises:
        ValueError: If the model has no adapters, as after a merge without ``keep_base=True``.
    """
    layers = [*adapted_layers(model)]
    if not layers:
        raise ValueError(
            "the model has no adapters, and no base weights to restore; merge with "
            "merge_adapters(model, keep_base=True)"
        )
    for _, layer in layers:
        layer.unmerge()


def set_strength(
    model: nn.Module,
    strength: float | Strengths | None = None,
    *,
    direction: float | None = None,
    magnitude: float | None = None,
    name: str | None = None,
) -> None:
    """Set the strengths of one adapter, or of all: ``W + strength * (W' - W)``.

    Args:
        model: A model with adapters.
        strength: 0 is exactly the base. 1 is exactly the adapter, if ``direction`` and
            ``magnitude`` are 1. `Strengths` sets all three. None leaves a strength unchanged.
        direction: Factor of the low-rank update, applied before the norm is computed.
        magnitude: Share of the magnitude's change that is applied.
        name: The adapter. None means all.

    Raises:
        ValueError: If no layer has an adapter of this name.
    """
    strengths = vars(strength) if isinstance(strength, Strengths) else {"strength": strength}
    components = {"direction_strength": direction, "magnitude_strength": magnitude}
    requested = strengths | {key: value for key, value in components.items() if value is not None}
    changed = {key: float(value) for key, value in requested.items() if value is not None}
    adapters = list(layer_adapters(model, name))
    if not adapters:
        raise ValueError("the model has no adapter" + (f" named {name!r}" if name else ""))
    for adapter in adapters:
        adapter.strengths = dataclasses.replace(adapter.strengths, **changed)
    for _, layer in adapted_layers(model):
        if layer.route is not None:
            layer.route.forget()


def layer_adapters(model: nn.Module, name: str | None = None) -> Iterator[LayerAdapter]:
    """Yield the `LayerAdapter` of each layer for one adapter; without a name, for all adapters."""
    for _, layer in adapted_layers(model):
        if name is None:
            yield from cast(Iterable[LayerAdapter], layer.adapters.values())
        elif name in layer.adapters:
            yield cast(LayerAdapter, layer.adapters[name])


def require_adapters(models: Iterable[nn.Module], names: Iterable[str | None]) -> None:
    """Check that the models have an adapter of each name; None is the base.

    Raises:
        ValueError: If no layer of any model has an adapter of one of the names.
    """
    known = {
        name for model in models for _, layer in adapted_layers(model) for name in layer.adapters
    }
    missing = [name for name in names if name is not None and name not in known]
    if missing:
        there = listing(known) or "none"
        raise ValueError(f"the models have no adapter named {missing[0]!r}; there are {there}")


@contextmanager
def disabled(*models: nn.Module, name: str | None = None) -> Iterator[None]:
    """Switch adapters off inside the block, so that the models compute exactly their base.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> report = inject_adapters(model, AdapterConfig(targets=("*",), rank=2))
        >>> with disabled(model):
        ...     base = model(torch.ones(1, 8))
    """
    switched = [a for model in models for a in layer_adapters(model, name) if a.enabled]
    for adapter in switched:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in switched:
            adapter.enabled = True


def adapter_parameters(model: nn.Module, name: str | None = None) -> Iterator[nn.Parameter]:
    """Yield the trainable parameters of one adapter, or of all."""
    for adapter in layer_adapters(model, name):
        yield from adapter.parameters()
