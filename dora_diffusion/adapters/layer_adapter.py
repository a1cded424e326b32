"""The parameters of one adapter on one layer."""

from __future__ import annotations

import dataclasses
from operator import attrgetter

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.directions import Direction
from dora_diffusion.numerics.weights import LayerKind, LayerWeights, NormAxis, Strengths

_VERSION = attrgetter("_version")


class LayerAdapter(nn.Module):
    """The parameters of one adapter on one layer, float32, and how strongly it acts.

    Attributes:
        down, up: As in `LayerWeights`, or what ``direction`` makes these from.
        magnitude, alpha, norm_axis, kind, groups: As in `LayerWeights`.
        direction: What makes A and B; None: they are ``down`` and ``up``.
        strengths: Its strengths; those of a new adapter are 1.
        enabled: False switches the adapter off.

    Args:
        weights: What it starts as.
        dropout: As in `AdapterConfig`.
        direction: See above.
        trained: ``down`` and ``up`` that the direction makes ``weights`` from.
    """

    magnitude: nn.Parameter | None
    direction: Direction | None

    def __init__(
        self,
        weights: LayerWeights,
        dropout: float = 0.0,
        direction: Direction | None = None,
        trained: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        down, up = trained or (weights.down, weights.up)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        magnitude = weights.magnitude
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.direction = direction
        self.alpha = weights.alpha
        self.norm_axis: NormAxis = weights.norm_axis
        self.kind: LayerKind = weights.kind
        self.groups = weights.groups
        self.dropout = dropout
        self.strengths = Strengths()
        self.enabled = True

    def weights(self) -> LayerWeights:
        """The live tensors, not copies; with a direction, what it makes of them."""
        down, up = self.down, self.up
        if self.direction is not None:
            # Whoever asks first may do so without gradients, and a norm scope keeps what it got.
            with torch.enable_grad():
                down, up = self.direction(down, up)
        return LayerWeights(
            down, up, self.magnitude, self.alpha, self.norm_axis, self.kind, self.groups
        )

    def versions(self) -> tuple[int, ...]:
        """Which parameters it has, and how often each was written in place; of a DoRA."""
        own = [*self._parameters.values()]
        if self.direction is not None:
            own += self.direction._parameters.values()
        try:
            return *map(id, own), *map(_VERSION, own)
        except RuntimeError:  # Tensors that were made in inference mode count nothing.
            return tuple(map(id, own))

    def scaled_weights(self) -> LayerWeights:
        """`weights`, with the direction's strength in their scale."""
        weights, strength = self.weights(), self.strengths.direction_strength
        if strength == 1:
            return weights
        return dataclasses.replace(weights, alpha=strength * weights.alpha)

    @torch.no_grad()
    def used_weights(self) -> LayerWeights:
        """What a file holds: `weights` without rows that a direction has switched off."""
        weights = self.weights()
        used = None if self.direction is None else self.direction.used()
        if used is None or bool(used.all()):
            return weights
        down, up = weights.down[used], weights.up[:, used]
        alpha = weights.alpha * down.shape[0] / weights.rank  # The scale stays.
        return dataclasses.replace(weights, down=down, up=up, alpha=alpha)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        kind = "LoRA" if self.magnitude is None else f"DoRA, norm_axis={self.norm_axis}"
        return f"{kind}, rank={self.down.shape[0]}, alpha={self.alpha:g}"
