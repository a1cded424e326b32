"""Tensors of one adapted layer, and strengths of adapters."""

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
# Layout of a weight in the model. "plain": (out, in, *k), for Linear and convolutions. Transposed,
# (in, out): "embedding", the table (num, dim) of an Embedding, whose outputs are the dimensions of
# its vectors; "conv1d", the weight of Conv1D in Transformers.
LayerKind = Literal["plain", "embedding", "conv1d"]


class MergeError(ValueError):
    """Base weights that cannot be merged into, or a merge that is not finite."""


@dataclass(frozen=True)
class LayerWeights:
    """Low-rank update of a layer's weight ``(out, in, *k)``, with its DoRA magnitude.

    Attributes:
        down: ``A``, shape ``(r, in)`` for a Linear or Embedding, ``(r, in / groups, *k)`` for a
            convolution.
        up: ``B``, shape ``(out, r)`` for a Linear or Embedding, ``(out, r, *1)`` for a convolution.
        magnitude: ``m``, flat: ``(out,)`` on the output axis, ``(in,)`` on the input axis (in a
            convolution with groups ``(in / groups,)``). None makes the layer a plain LoRA.
        alpha: Effective alpha. The scale is always ``alpha / r``; rank-stabilised LoRA
            (arXiv:2312.03732) is stored as ``alpha * sqrt(r)``.
        norm_axis: Axis of the magnitude. It has no meaning without a magnitude.
        kind: Layout of the weight in the model.
        groups: Number of groups of a convolution, if known. Adapter files do not store it.

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
                f"up must be (out, r), followed by ones for a convolution, with r = "
                f"{self.down.shape[0]}"
            )
        if self.magnitude is not None and tuple(self.magnitude.shape) != (self.magnitude_size,):
            raise ValueError(
                f"magnitude has shape {tuple(self.magnitude.shape)}; the {self.norm_axis} axis of "
                f"{self.weight_shape} needs ({self.magnitude_size},)"
            )

    @property
    def rank(self) -> int:
        """Rank r."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """``s = alpha / r``, the factor of ``B @ A``."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the adapted weight, ``(out, in, *k)``."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the adapted weight as the model stores it."""
        return self.weight_shape if self.kind == "plain" else self.weight_shape[::-1]

    @property
    def magnitude_size(self) -> int:
        """Number of magnitudes on the norm axis."""
        return self.up.shape[0] if self.norm_axis == "output" else self.down.shape[1]

    @property
    def layer_name(self) -> str:
        """Name of this kind of layer in PyTorch or Transformers."""
        if self.kind != "plain":
            return {"embedding": "Embedding", "conv1d": "Conv1D"}[self.kind]
        return {2: "Linear", 3: "Conv1d", 4: "Conv2d"}[self.down.ndim]

    @property
    def kind_and_size(self) -> str:
        """Layer name with the kernel size of a convolution: ``"Conv2d 3x3"``."""
        return " ".join([self.layer_name, "x".join(map(str, self.down.shape[2:]))]).rstrip()

    def to(self, *args: torch.device | torch.dtype | str, copy: bool = False) -> LayerWeights:
        """Move or cast the tensors (``Tensor.to``)."""
        magnitude = None if self.magnitude is None else self.magnitude.to(*args, copy=copy)
        down, up = (factor.to(*args, copy=copy) for factor in (self.down, self.up))
        return dataclasses.replace(self, down=down, up=up, magnitude=magnitude)

    def narrow(self, dim: int, start: int, length: int) -> LayerWeights:
        """Select output (``dim`` 0) or input (``dim`` 1) channels of the weight.

        The channels can be computed separately, unless the magnitude is on the other axis.
        """
        name = ("up", "down")[dim]
        magnitude = self.magnitude
        if magnitude is not None and self.norm_axis == NORM_AXES[dim]:
            magnitude = magnitude.narrow(0, start, length)
        factor = getattr(self, name).narrow(dim, start, length)
        return dataclasses.replace(self, magnitude=magnitude, **{name: factor})

    def with_swapped_halves(self) -> LayerWeights:
        """Exchange the halves of the output channels."""
        magnitude = self.magnitude
        if magnitude is not None and self.norm_axis == "output":
            magnitude = swap_halves(magnitude)
        return dataclasses.replace(self, up=swap_halves(self.up), magnitude=magnitude)


def swap_halves(tensor: Tensor) -> Tensor:
    """Exchange the halves of dim 0."""
    return tensor.roll(tensor.shape[0] // 2, 0)


def out_in(weight: Tensor, kind: LayerKind) -> Tensor:
    """View a weight as the model stores it as ``(out, in, *k)``, or the reverse."""
    return weight if kind == "plain" else weight.t()


STRENGTH_LIMIT = 10
"""Largest absolute value of strengths, far beyond usable values."""


@dataclass(frozen=True)
class Strengths:
    """Strengths of one adapter.

    Attributes:
        strength: Factor of the whole change, ``W + strength * (W' - W)``. 0 is the base, 1 the
            adapter as trained.
        direction_strength: Factor of the low-rank update inside the norm.
        magnitude_strength: Factor of the magnitude's change from the norm of the base.

    Raises:
        ValueError: If a strength exceeds `STRENGTH_LIMIT` or is NaN.
    """

    strength: float = 1.0
    direction_strength: float = 1.0
    magnitude_strength: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            require_strength(field.name, getattr(self, field.name))

    @classmethod
    def of(cls, strength: float | Strengths) -> Self:
        """Build strengths from a single strength or from other strengths."""
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
    """Check that a strength is in range.

    Raises:
        ValueError: If it exceeds `STRENGTH_LIMIT`, as a percentage would, or is NaN.
    """
    if not abs(value) <= STRENGTH_LIMIT:
        raise ValueError(
            f"{name} is {value:g}; it must be between -{STRENGTH_LIMIT} and {STRENGTH_LIMIT}, "
            "where 1 is the adapter as trained"
        )
