"""Initial weights of a new adapter, random or from another adapter, and the report on it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from dora_diffusion.adapters.kinds import layer_groups, layer_kind, layer_matrix
from dora_diffusion.adapters.layers import LayerAdapter
from dora_diffusion.adapters.targets import first_naming, is_conv
from dora_diffusion.config import AdapterConfig
from dora_diffusion.config.wording import counted, listing
from dora_diffusion.numerics.dora import adapted_norm, weight_norm
from dora_diffusion.numerics.weights import LayerKind, LayerWeights, NormAxis

if TYPE_CHECKING:
    from dora_diffusion.numerics.projections import Projections

# Path up to the innermost numbered block; the rest names the same layer in every block.
_BLOCKS = re.compile(r".*\b\w+s\.\d+\.")


@dataclass(frozen=True)
class AdaptedLayerReport:
    """One layer of an `InjectionReport`. The shape is ``(out, in, *k)`` for every kind of layer."""

    path: str
    kind: str
    weight_shape: tuple[int, ...]
    rank: int
    parameters: int


@dataclass(frozen=True)
class InjectionReport:
    """Adapted layers and their trained parameters: ``r * (fan_in + out)`` and magnitudes.

    With a parametrization, ``rank`` is the rank of the trained parameters, not of A and B.
    """

    layers: tuple[AdaptedLayerReport, ...]

    @classmethod
    def of(cls, adapters: Mapping[str, LayerAdapter]) -> InjectionReport:
        """Return the report on adapters, given by the path of their layer."""
        lines = []
        for path, adapter in adapters.items():
            weights, rank = adapter.weights(), adapter.down.shape[0]
            count = sum(parameter.numel() for parameter in adapter.parameters())
            kind, shape = weights.layer_name, weights.weight_shape
            lines.append(AdaptedLayerReport(path, kind, shape, rank, count))
        return cls(tuple(lines))

    @property
    def parameters(self) -> int:
        """Number of trainable parameters of the adapter."""
        return sum(layer.parameters for layer in self.layers)

    def __str__(self) -> str:
        kinds = sorted({layer.kind for layer in self.layers}, reverse=True)
        counts = ", ".join(f"{sum(layer.kind == k for layer in self.layers)} {k}" for k in kinds)
        layers = counted(len(self.layers), "layer")
        return f"{layers} adapted ({counts}), {self.parameters:,} parameters"


def check_rank(path: str, module: nn.Module, config: AdapterConfig) -> None:
    """Check that the rank is no larger than the layer; VeRA's projections may have any rank.

    Raises:
        ValueError: If it is larger; names the setting and the largest rank.
    """
    _check_variant(path, module, config)
    if config.parametrization == "vera":
        return
    weight = layer_matrix(module)
    rank, _ = _rank_and_alpha(path, module, config)
    largest = min(weight.shape[0], weight[0].numel())
    if rank > largest:
        setting = _rank_setting(path, module, config)
        raise ValueError(
            f"{setting} {rank} is larger than the layer {path} with its weight "
            f"{tuple(weight.shape)}; use {setting} <= {largest}, or leave that layer out"
        )


def _rank_and_alpha(path: str, module: nn.Module, config: AdapterConfig) -> tuple[int, float]:
    rank = config.rank_pattern.get(first_naming(config.rank_pattern, path, module))
    return config.rank_and_alpha(is_conv(module), rank, _own_alpha(path, module, config))


def _own_alpha(path: str, module: nn.Module, config: AdapterConfig) -> float | None:
    """Return the alpha of a layer in ``alpha_pattern``; None if no pattern names it."""
    return config.alpha_pattern.get(first_naming(config.alpha_pattern, path, module))


def _rank_setting(path: str, module: nn.Module, config: AdapterConfig) -> str:
    """Return the name of the setting that gives a layer its rank."""
    if pattern := first_naming(config.rank_pattern, path, module):
        return f"rank_pattern {pattern}"
    return "conv_rank" if is_conv(module) else "rank"


def _check_variant(path: str, module: nn.Module, config: AdapterConfig) -> None:
    """Check that the layer supports the initialization and parametrization of the config."""
    if config.init == "random" and config.parametrization == "low-rank":
        return
    if layer_kind(module) == "embedding" or layer_groups(module) != 1:
        setting = "init" if config.init != "random" else "parametrization"
        kind = "an Embedding" if layer_kind(module) == "embedding" else "a convolution with groups"
        raise ValueError(
            f"{path} is {kind}, and {setting} {getattr(config, setting)} is for Linear layers and "
            "convolutions without groups; leave it out of the targets, or take init random and "
            "parametrization low-rank"
        )


def check_start(
    modules: Mapping[str, nn.Module], config: AdapterConfig, start: Mapping[str, LayerWeights]
) -> None:
    """Check that an adapter of this config can start from another adapter.

    Args:
        modules: The layers that the config adapts, by path.
        config: Settings of the new adapter.
        start: The other adapter's layers, by path.

    Raises:
        ConfigError, ValueError: If it cannot; names the setting to change.
    """
    config.check_start()
    if left := [path for path in start if path not in modules]:
        patterns = dict.fromkeys(f"'{_BLOCKS.sub('*.', path)}'" for path in left)
        raise ValueError(
            f"targets leave out {counted(len(left), 'layer')} of the adapter, such as {left[0]}; "
            f"add {' '.join(patterns)} to them"
        )
    for path, layer in start.items():
        if layer.weight_shape != (shape := tuple(layer_matrix(modules[path]).shape)):
            raise ValueError(f"{path} has shape {shape}, the adapter's is {layer.weight_shape}")
    _check_start_ranks(modules, config, start)
    scaled = [layer for layer in start.values() if layer.magnitude is not None]
    if scaled and not config.use_dora:
        raise ValueError("it is a DoRA, which no LoRA can start from; train a DoRA (method dora)")
    if axes := {layer.norm_axis for layer in scaled} - {config.norm_axis}:
        raise ValueError(f"its magnitudes run along the {axes.pop()} axis; set norm_axis to that")


def _check_start_ranks(
    modules: Mapping[str, nn.Module], config: AdapterConfig, start: Mapping[str, LayerWeights]
) -> None:
    needed: dict[str, int] = {}
    have: dict[str, int] = {}
    for path, layer in start.items():
        name = _rank_setting(path, modules[path], config)
        needed[name] = max(needed.get(name, 0), layer.rank)
        have[name], _ = _rank_and_alpha(path, modules[path], config)
    names = sorted(needed, reverse=True)
    if larger := [f"{name} {needed[name]}" for name in names if needed[name] > have[name]]:
        rank = have.get("rank", min(have.values()))
        conv = f" --conv_rank {have['conv_rank']}" if "conv_rank" in have else ""
        configured = listing([f"{name} {rank}" for name, rank in have.items()])
        raise ValueError(
            f"it has {' and '.join(larger)}, more than {configured}; set {' and '.join(larger)} or "
            "more, or make it smaller with 'dora-diffusion convert ADAPTER SMALLER --to "
            f"smaller-rank --rank {rank}{conv}'"
        )


def fresh_adapters(
    modules: Mapping[str, nn.Module],
    config: AdapterConfig,
    generator: torch.Generator | None,
    start: Mapping[str, LayerWeights] | None = None,
) -> dict[str, LayerAdapter]:
    """Return a new adapter for each layer, by path: float32, m = norm(W + delta).

    Args:
        modules: The layers, by path.
        config: Settings of the adapter.
        generator: Generator of the random weights. None uses the global one.
        start: Another adapter's layers, by path. The new adapter changes the model as the other
            does, up to rounding where rank or scale differ. Its other layers change nothing.
    """
    projections = None
    if config.parametrization == "vera":
        from dora_diffusion.numerics.projections import Projections

        shapes = [tuple(layer_matrix(module).shape) for module in modules.values()]
        projections = Projections.of(shapes, config.rank, config.projection_seed)
    return {
        path: _fresh_adapter(path, module, config, generator, projections, (start or {}).get(path))
        for path, module in modules.items()
    }


def _fresh_adapter(
    path: str,
    module: nn.Module,
    config: AdapterConfig,
    generator: torch.Generator | None,
    projections: Projections | None,
    other: LayerWeights | None,
) -> LayerAdapter:
    weight, kind = layer_matrix(module).detach(), layer_kind(module)
    rank, alpha = _rank_and_alpha(path, module, config)
    axis = cast(NormAxis, config.norm_axis)
    magnitude = weight_norm(weight, axis).float() if config.use_dora else None
    if config.parametrization == "low-rank" and config.init != "pissa":
        factors = _random_factors(weight, rank, kind, generator)
        weights = LayerWeights(*factors, magnitude, alpha, axis, kind, layer_groups(module))
        if other is not None:
            keeps = config.keeps_scale(is_conv(module), _own_alpha(path, module, config))
            weights = _started(weights, other, weight, keeps)
        return LayerAdapter(weights, config.dropout)
    from dora_diffusion.adapters.parametrizations import build_parametrization

    parametrization = build_parametrization(config, weight, rank, alpha, projections)
    start = parametrization.start(generator)
    with torch.no_grad():
        down, up = parametrization(*start)
    weights = LayerWeights(down, up, magnitude, alpha * down.shape[0] / rank, axis, kind)
    return LayerAdapter(weights, config.dropout, parametrization, start)


def _started(
    fresh: LayerWeights, other: LayerWeights, weight: torch.Tensor, keep_scale: bool
) -> LayerWeights:
    """Return fresh weights with another adapter's in the first ranks; other ranks add nothing."""
    other, rank = other.to(fresh.down.device), other.rank
    up, alpha = other.up, fresh.alpha
    if keep_scale:
        alpha = other.alpha if rank == fresh.rank else other.scale * fresh.rank
    elif other.scale != fresh.scale:
        up = up * (other.scale / fresh.scale)
    down = torch.cat([other.down, fresh.down[rank:]])
    up = torch.cat([up, fresh.up[:, rank:]], dim=1)
    magnitude = None if fresh.magnitude is None else other.magnitude
    layer = dataclasses.replace(fresh, down=down, up=up, alpha=alpha, magnitude=magnitude)
    if fresh.magnitude is not None and magnitude is None:
        layer = dataclasses.replace(layer, magnitude=adapted_norm(weight, layer).float())
    return layer


def _random_factors(
    weight: torch.Tensor, rank: int, kind: LayerKind, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as in PEFT, and B = 0.

    Embedding (as in PEFT): A = 0 and B from N(0, 1). A has a column for each row of the table, so
    rows that are never looked up keep their direction.
    """
    # Draw on the generator's device, so that a seed gives the same adapter on every device.
    source = torch.device("cpu") if generator is None else generator.device
    down = torch.zeros(rank, *weight.shape[1:], device=source)
    up = torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2), device=source)
    if kind == "embedding":
        up.normal_(generator=generator)
    else:
        bound = 1 / math.sqrt(weight[0].numel())
        down.uniform_(-bound, bound, generator=generator)
    return down.to(weight.device), up.to(weight.device)
