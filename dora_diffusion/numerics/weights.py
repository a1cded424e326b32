"""The tensors of one adapted layer, as every other part of the package passes them around."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

NormAxis = Literal["output", "input"]
NORM_AXES: tuple[NormAxis, ...] = get_args(NormAxis)
# How a model stores a weight, of what kind of layer. "plain": (out, in, *k), of Linear and
# convolutions. Transposed, (in, out): "embedding", the table (num, dim) of an Embedding, whose
# outputs are the dimensions of its vectors; "conv1d", the weight of transformers' Conv1D.
LayerKind = Literal["plain", "embedding", "conv1d"]


class MergeError(ValueError):
    """Base weights that cannot be merged into, or a merge that is not finite."""


@dataclass(frozen=True)
class LayerWeights:
    """A low-rank update of one layer's weight ``(out, in, *k)``, with its DoRA magnitude.

    Attributes:
        down: ``A``, shape ``(r, in)`` for a Linear or Embedding, ``(r, in / groups, *k)`` for a
            convolution.
        up: ``B``, shape ``(out, r)`` for a Linear or Embedding, ``(out, r, *1)`` for a convolution.
        magnitude: ``m``, flat: ``(out,)`` on the output axis, ``(in,)`` on the input axis (in a
            convolution with groups ``(in / groups,)``). None makes the layer a plain LoRA.
        alpha: Effective alpha. The scale is always ``alpha / r``; rank-stabilised LoRA
            (arXiv:2312.03732) is stored as ``alpha * sqrt(r)``.
        norm_axis: The axis that the magnitude runs along. Meaningless without a magnitude.
        kind: How the model stores the weight.
        groups: Of a convolution, where it is known: files do not say it.

    Raises:
        ValueError: If the shapes do not belong together.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None
    alpha: float = 1.0
    norm_axis: NormAxis = "output"
    kind: LayerKind = "plain"
    groups: int = 1

    def __post_init__(self) -> None:
        if self.norm_axis not in NORM_AXES:
            raise ValueError(f"norm_axis is {self.norm_axis!r}; it must be one of {NORM_AXES}")
        if self.down.ndim not in (2, 3, 4) or self.up.ndim != self.down.ndim:
            raise ValueError(
                f"low-rank factors must both be 2-D (Linear), 3-D (Conv1d) or 4-D (Conv2d), "
                f"got down {tuple(self.down.shape)} and up {tuple(self.up.shape)}"
            )
        if self.kind != "plain" and self.down.ndim != 2:
            raise ValueError(f"the factors of kind {self.kind!r} must be 2-D")
        if self.up.shape[1] != self.down.shape[0] or self.up.shape[2:].numel() != 1:
            raise ValueError(
                f"down {tuple(self.down.shape)} and up {tuple(self.up.shape)} do not multiply: "
                f"up must be (out, r), with ones behind it for a convolution, and r = "
                f"{self.down.shape[0]}"
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
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the same weight as the model stores it."""
        return self.weight_shape if self.kind == "plain" else self.weight_shape[::-1]

    @property
    def magnitude_size(self) -> int:
        """Number of magnitudes that the norm axis asks for."""
        return self.up.shape[0] if self.norm_axis == "output" else self.down.shape[1]

    @property
    def layer_name(self) -> str:
        """Name of a layer of this kind in PyTorch, or in transformers."""
        if self.kind != "plain":
            return {"embedding": "Embedding", "conv1d": "Conv1D"}[self.kind]
        return {2: "Linear", 3: "Conv1d", 4: "Conv2d"}[self.down.ndim]

    @property
    def kind_and_size(self) -> str:
        """The same with the size of a convolution's kernel: ``"Conv2d 3x3"``."""
        return " ".join([self.layer_name, "x".join(map(str, self.down.shape[2:]))]).rstrip()

    def to(self, *args: torch.device | torch.dtype | str, copy: bool = False) -> LayerWeights:
        """Return the layer with its tensors moved or cast, as ``Tensor.to`` does."""
        magnitude = None if self.magnitude is None else self.magnitude.to(*args, copy=copy)
        down, up = (factor.to(*args, copy=copy) for factor in (self.down, self.up))
        return dataclasses.replace(self, down=down, up=up, magnitude=magnitude)

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


def out_in(weight: Tensor, kind: LayerKind) -> Tensor:
    """A weight as the model stores it, seen as ``(out, in, *k)``; and the other way round."""
    return weight if kind == "plain" else weight.t()


STRENGTH_LIMIT = 10
"""Limit of strengths, far beyond what any image survives."""


@dataclass(frozen=True)
class Strengths:
    """Strengths of one adapter.

    Attributes:
        strength: ``W + strength * (W' - W)``: 0 is the base, 1 the adapter as trained.
        direction_strength: Scales the low-rank difference inside the norm.
        magnitude_strength: Moves the magnitude by a share of its change from the base's norm.

    Raises:
        ValueError: If one is not a number of at most `STRENGTH_LIMIT`.
    """

    strength: float = 1.0
    direction_strength: float = 1.0
    magnitude_strength: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            require_strength(field.name, getattr(self, field.name))

    @classmethod
    def of(cls, strength: float | Strengths) -> Self:
        """Strengths that may be given by the plain one alone, or without those of parts."""
        return cls(**vars(strength)) if isinstance(strength, Strengths) else cls(strength)


@dataclass(frozen=True)
class MergeStrengths(Strengths):
    """Strengths of a merge of adapters into a model.

    Attributes:
        unet_strength: Multiplies ``strength`` for the UNet.
        text_encoder_strength: Multiplies it for the text encoders.
    """

    unet_strength: float = 1.0
    text_encoder_strength: float = 1.0


def require_strength(name: str, value: float) -> None:
    """Refuse a strength that is not a share of what was trained: 70 for 0.7, or NaN.

    Raises:
        ValueError: If so.
    """
    if not abs(value) <= STRENGTH_LIMIT:
        raise ValueError(
            f"{name} is {value:g}; it must be between -{STRENGTH_LIMIT} and {STRENGTH_LIMIT}, "
            "where 1 is the adapter as trained"
        )
