"""The parameters of one adapter on one layer."""

from __future__ import annotations

import dataclasses

from torch import nn

from dora_diffusion.numerics.weights import LayerKind, LayerWeights, NormAxis, Strengths


class LayerAdapter(nn.Module):
    """The parameters of one adapter on one layer, float32, and how strongly it acts.

    Attributes:
        down, up, magnitude, alpha, norm_axis, kind, groups: As in `LayerWeights`.
        strengths: Its strengths; those of a new adapter are 1.
        enabled: False switches the adapter off.
    """

    magnitude: nn.Parameter | None

    def __init__(self, weights: LayerWeights, dropout: float = 0.0) -> None:
        super().__init__()
        self.down = nn.Parameter(weights.down)
        self.up = nn.Parameter(weights.up)
        magnitude = weights.magnitude
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.alpha = weights.alpha
        self.norm_axis: NormAxis = weights.norm_axis
        self.kind: LayerKind = weights.kind
        self.groups = weights.groups
        self.dropout = dropout
        self.strengths = Strengths()
        self.enabled = True

    def weights(self) -> LayerWeights:
        """The live tensors, not copies."""
        return LayerWeights(
            self.down, self.up, self.magnitude, self.alpha, self.norm_axis, self.kind, self.groups
        )

    def scaled_weights(self) -> LayerWeights:
        """`weights`, with the direction's strength in their scale."""
        return dataclasses.replace(
            self.weights(), alpha=self.strengths.direction_strength * self.alpha
        )

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        kind = "LoRA" if self.magnitude is None else f"DoRA, norm_axis={self.norm_axis}"
        return f"{kind}, rank={self.down.shape[0]}, alpha={self.alpha:g}"
