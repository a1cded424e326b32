"""A new adapter's weights for a layer, and the report of what was adapted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from dora_diffusion.adapters.kinds import layer_groups, layer_kind, layer_matrix
from dora_diffusion.adapters.targets import is_conv
from dora_diffusion.config import AdapterConfig
from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.weights import LayerWeights, NormAxis
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
    """What was adapted, and how many parameters train: ``r * (fan_in + out)`` and magnitudes."""

    layers: tuple[AdaptedLayerReport, ...]

    @classmethod
    def of(cls, weights: Mapping[str, LayerWeights]) -> InjectionReport:
        """The report on weights by the path of their layer."""
        return cls(tuple(_report(path, layer) for path, layer in weights.items()))

    @property
    def parameters(self) -> int:
        """Trainable parameters of the adapter."""
        return sum(layer.parameters for layer in self.layers)

    def __str__(self) -> str:
        kinds = sorted({layer.kind for layer in self.layers}, reverse=True)
        counts = ", ".join(f"{sum(layer.kind == k for layer in self.layers)} {k}" for k in kinds)
        layers = counted(len(self.layers), "layer")
        return f"{layers} adapted ({counts}), {self.parameters:,} parameters"


def _report(path: str, weights: LayerWeights) -> AdaptedLayerReport:
    tensors = (weights.down, weights.up, weights.magnitude)
    count = sum(tensor.numel() for tensor in tensors if tensor is not None)
    return AdaptedLayerReport(path, weights.layer_name, weights.weight_shape, weights.rank, count)


def check_rank(path: str, module: nn.Module, config: AdapterConfig) -> None:
    """Refuse a rank that is larger than a layer.

    Raises:
        ValueError: With the setting and the largest rank.
    """
    weight = layer_matrix(module)
    rank, _ = config.rank_and_alpha(is_conv(module))
    largest = min(weight.shape[0], weight[0].numel())
    if rank > largest:
        setting = "conv_rank" if is_conv(module) else "rank"
        raise ValueError(
            f"{setting} {rank} is larger than the layer {path} with its weight "
            f"{tuple(weight.shape)}; use {setting} <= {largest}, or leave that layer out"
        )


def fresh_weights(
    module: nn.Module, config: AdapterConfig, generator: torch.Generator | None
) -> LayerWeights:
    """A from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) as PEFT draws it, B = 0, m = norm(W); float32.

    Of an Embedding, as in PEFT, A = 0 and B from N(0, 1): A has a column for each row of the table,
    so that rows that are never looked up keep their direction.
    """
    weight, kind = layer_matrix(module).detach(), layer_kind(module)
    rank, alpha = config.rank_and_alpha(is_conv(module))
    axis = cast(NormAxis, config.norm_axis)
    # Drawn on the generator's device, so that a seed gives the same adapter on every device.
    source = torch.device("cpu") if generator is None else generator.device
    down = torch.zeros(rank, *weight.shape[1:], device=source)
    up = torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2), device=source)
    if kind == "embedding":
        up.normal_(generator=generator)
    else:
        bound = 1 / math.sqrt(weight[0].numel())
        down.uniform_(-bound, bound, generator=generator)
    magnitude = weight_norm(weight, axis).float() if config.use_dora else None
    factors = down.to(weight.device), up.to(weight.device)
    return LayerWeights(*factors, magnitude, alpha, axis, kind, layer_groups(module))
