"""A new adapter's weights for a layer, and the report of what was adapted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from dora_diffusion.adapters.kinds import layer_groups, layer_kind, layer_matrix
from dora_diffusion.adapters.layers import LayerAdapter
from dora_diffusion.adapters.parametrizations import (
    Parametrization,
    PrincipalParametrization,
    ProjectedParametrization,
    SingularParametrization,
)
from dora_diffusion.adapters.targets import is_conv
from dora_diffusion.config import AdapterConfig
from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.projections import Projections
from dora_diffusion.numerics.weights import LayerKind, LayerWeights, NormAxis
from dora_diffusion.wording import counted


@dataclass(frozen=True)
class AdaptedLayerReport:
    """One line of an `InjectionReport`; the shape is ``(out, in, *k)``, however it is stored."""

    path: str
    kind: str
    weight_shape: tuple[int, ...]
    rank: int
    parameters: int


@dataclass(frozen=True)
class InjectionReport:
    """What was adapted, and how many parameters train: ``r * (fan_in + out)`` and magnitudes.

    Of an adapter with another parametrization than A and B, ``rank`` is what it trains.
    """

    layers: tuple[AdaptedLayerReport, ...]

    @classmethod
    def of(cls, adapters: Mapping[str, LayerAdapter]) -> InjectionReport:
        """The report on adapters by the path of their layer."""
        lines = []
        for path, adapter in adapters.items():
            weights, rank = adapter.weights(), adapter.down.shape[0]
            count = sum(parameter.numel() for parameter in adapter.parameters())
            lines.append(
                AdaptedLayerReport(path, weights.layer_name, weights.weight_shape, rank, count)
            )
        return cls(tuple(lines))

    @property
    def parameters(self) -> int:
        """Trainable parameters of the adapter."""
        return sum(layer.parameters for layer in self.layers)

    def __str__(self) -> str:
        kinds = sorted({layer.kind for layer in self.layers}, reverse=True)
        counts = ", ".join(f"{sum(layer.kind == k for layer in self.layers)} {k}" for k in kinds)
        layers = counted(len(self.layers), "layer")
        return f"{layers} adapted ({counts}), {self.parameters:,} parameters"


def check_rank(path: str, module: nn.Module, config: AdapterConfig) -> None:
    """Refuse a rank that is larger than a layer; VeRA's random projections may have any.

    Raises:
        ValueError: With the setting and the largest rank.
    """
    _check_variant(path, module, config)
    if config.parametrization == "vera":
        return
    weight = layer_matrix(module)
    rank, _ = config.rank_and_alpha(is_conv(module))
    largest = min(weight.shape[0], weight[0].numel())
    if rank > largest:
        setting = "conv_rank" if is_conv(module) else "rank"
        raise ValueError(
            f"{setting} {rank} is larger than the layer {path} with its weight "
            f"{tuple(weight.shape)}; use {setting} <= {largest}, or leave that layer out"
        )


def _check_variant(path: str, module: nn.Module, config: AdapterConfig) -> None:
    """Refuse what only layers with A and B of their own can have."""
    if config.init == "random" and config.parametrization == "low-rank":
        return
    if layer_kind(module) == "embedding" or layer_groups(module) != 1:
        what = (
            f"init {config.init}"
            if config.init != "random"
            else f"parametrization {config.parametrization}"
        )
        kind = "an Embedding" if layer_kind(module) == "embedding" else "a convolution with groups"
        raise ValueError(
            f"{path} is {kind}, and {what} is for Linear layers and convolutions without groups; "
            "leave it out of the targets, or take init random and parametrization low-rank"
        )


def fresh_adapters(
    modules: Mapping[str, nn.Module], config: AdapterConfig, generator: torch.Generator | None
) -> dict[str, LayerAdapter]:
    """A new adapter for each layer by its path, which changes nothing: float32, m = norm(W).

    Args:
        modules: The layers.
        config: What the adapter is made of.
        generator: Draws what is random. None uses the global one.
    """
    projections = None
    if config.parametrization == "vera":
        shapes = [tuple(layer_matrix(module).shape) for module in modules.values()]
        projections = Projections.of(shapes, config.rank, config.projection_seed)
    return {
        path: _fresh_adapter(module, config, generator, projections)
        for path, module in modules.items()
    }


def _fresh_adapter(
    module: nn.Module,
    config: AdapterConfig,
    generator: torch.Generator | None,
    projections: Projections | None,
) -> LayerAdapter:
    weight, kind = layer_matrix(module).detach(), layer_kind(module)
    rank, alpha = config.rank_and_alpha(is_conv(module))
    axis = cast(NormAxis, config.norm_axis)
    magnitude = weight_norm(weight, axis).float() if config.use_dora else None
    parametrization: Parametrization | None = None
    if projections is not None:
        parametrization = ProjectedParametrization(projections, weight)
    elif config.parametrization == "adalora":
        parametrization = SingularParametrization(weight, rank)
    elif config.init == "pissa":
        parametrization = PrincipalParametrization(weight, rank, alpha / rank)
    if parametrization is None:
        factors = _random_factors(weight, rank, kind, generator)
        weights = LayerWeights(*factors, magnitude, alpha, axis, kind, layer_groups(module))
        return LayerAdapter(weights, config.dropout)
    start = parametrization.start(generator)
    with torch.no_grad():
        down, up = parametrization(*start)
    weights = LayerWeights(down, up, magnitude, alpha * down.shape[0] / rank, axis, kind)
    return LayerAdapter(weights, config.dropout, parametrization, start)


def _random_factors(
    weight: torch.Tensor, rank: int, kind: LayerKind, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) as PEFT draws it, B = 0.

    Of an Embedding, as in PEFT, A = 0 and B from N(0, 1): A has a column for each row of the table,
    so that rows that are never looked up keep their direction.
    """
    # Drawn on the generator's device, so that a seed gives the same adapter on every device.
    source = torch.device("cpu") if generator is None else generator.device
    down = torch.zeros(rank, *weight.shape[1:], device=source)
    up = torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2), device=source)
    if kind == "embedding":
        up.normal_(generator=generator)
    else:
        bound = 1 / math.sqrt(weight[0].numel())
        down.uniform_(-bound, bound, generator=generator)
    return down.to(weight.device), up.to(weight.device)
