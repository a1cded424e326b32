"""The tensors of one adapted layer, as every other part of the package passes them around."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

NormAxis = Literal["output", "input"]
NORM_AXES: tuple[NormAxis, ...] = get_args(NormAxis)


@dataclass(frozen=True)
class LayerWeights:
    """A low-rank update of one Linear or Conv2d weight ``(out, in, *k)``, with its DoRA magnitude.

    Attributes:
        down: ``A``, shape ``(r, in)`` for Linear, ``(r, in, kh, kw)`` for Conv2d.
        up: ``B``, shape ``(out, r)`` for Linear, ``(out, r, 1, 1)`` for Conv2d.
        magnitude: ``m``, flat: ``(out,)`` on the output axis, ``(in,)`` on the input axis.
            None makes the layer a plain LoRA.
        alpha: Effective alpha. The scale is always ``alpha / r``; rank-stabilised LoRA
            (arXiv:2312.03732) is stored as ``alpha * sqrt(r)``.
        norm_axis: The axis that the magnitude runs along. Meaningless without a magnitude.

    Raises:
        ValueError: If the shapes do not belong together.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None
    alpha: float = 1.0
    norm_axis: NormAxis = "output"

    def __post_init__(self) -> None:
        if self.norm_axis not in NORM_AXES:
            raise ValueError(f"norm_axis is {self.norm_axis!r}; it must be one of {NORM_AXES}")
        if self.down.ndim not in (2, 4) or self.up.ndim != self.down.ndim:
            raise ValueError(
                f"low-rank factors must both be 2-D (Linear) or 4-D (Conv2d), "
                f"got down {tuple(self.down.shape)} and up {tuple(self.up.shape)}"
            )
        if self.up.shape[1] != self.down.shape[0] or self.up.shape[2:].numel() != 1:
            raise ValueError(
                f"down {tuple(self.down.shape)} and up {tuple(self.up.shape)} do not multiply: "
                f"up must be (out, r) or (out, r, 1, 1) with r = {self.down.shape[0]}"
            )
        if self.magnitude is not None and tuple(self.magnitude.shape) != (self.magnitude_size,):
            raise ValueError(
                f"magnitude has shape {tuple(self.magnitude.shape)}; the {self.norm_axis} axis of "
                f"{self.weight_shape} needs ({self.magnitude_size},)"
            )

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """``s = alpha / r``, the factor of ``B @ A``."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight this layer adapts, ``(out, in, *k)``."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def magnitude_size(self) -> int:
        """Number of magnitudes that the norm axis asks for."""
        return self.up.shape[0] if self.norm_axis == "output" else self.down.shape[1]

    def to(self, *args: torch.device | torch.dtype | str) -> LayerWeights:
        """Return the layer with its tensors moved or cast, as ``Tensor.to`` does."""
        magnitude = None if self.magnitude is None else self.magnitude.to(*args)
        return dataclasses.replace(
            self, down=self.down.to(*args), up=self.up.to(*args), magnitude=magnitude
        )

    def narrow(self, dim: int, start: int, length: int) -> LayerWeights:
        """The layer of some output (``dim`` 0) or input (``dim`` 1) channels of its weight.

        The formula holds for this part alone unless the magnitude runs along the other axis.
        """
        name = ("up", "down")[dim]
        magnitude = self.magnitude
        if magnitude is not None and self.norm_axis == NORM_AXES[dim]:
            magnitude = magnitude.narrow(0, start, length)
        part = getattr(self, name).narrow(dim, start, length)
        return dataclasses.replace(self, magnitude=magnitude, **{name: part})


@dataclass(frozen=True)
class Strengths:
    """How strongly one adapter acts.

    Attributes:
        strength: ``W + strength * (W' - W)``: 0 is the base, 1 the adapter as trained.
        direction_strength: Scales the low-rank difference inside the norm.
        magnitude_strength: Moves the magnitude by a share of its change from the base's norm.
    """

    strength: float = 1.0
    direction_strength: float = 1.0
    magnitude_strength: float = 1.0
