"""Linear and Conv2d as one kind of object, so that the formula is written once for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor


class Operation(Protocol):
    """A linear map with a weight ``(out, in, *k)``.

    Attributes:
        channel_dim: Which dimension of an activation holds its channels.
    """

    channel_dim: ClassVar[int]

    def __hash__(self) -> int:
        """It is a value."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the weight to ``x``."""

    def pointwise(self, x: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply ``up``, ``(out, r)`` or ``(out, r, 1, 1)``, to what ``down`` made."""

    def broadcast(self, vector: Tensor) -> Tensor:
        """Shape ``(channels,)`` to multiply an activation."""


@dataclass(frozen=True)
class LinearOperation:
    """``x (..., in)`` -> ``(..., out)``."""

    channel_dim: ClassVar[int] = -1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias``."""
        return F.linear(x, weight, bias)

    def pointwise(self, x: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        """A Linear's low-rank factors are both Linears."""
        return F.linear(x, up, bias)

    def broadcast(self, vector: Tensor) -> Tensor:
        """Channels are last already."""
        return vector


@dataclass(frozen=True)
class Conv2dOperation:
    """``x (N, in, H, W)`` -> ``(N, out, H', W')``, zero padding, one group."""

    channel_dim: ClassVar[int] = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve."""
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def pointwise(self, x: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        """``up`` is a 1x1 convolution on what ``down`` made, whatever the stride was."""
        # Stride, padding and dilation were applied by A; applied twice, the sizes would not fit.
        return F.conv2d(x, up, bias)

    def broadcast(self, vector: Tensor) -> Tensor:
        """``(channels,)`` -> ``(channels, 1, 1)``."""
        # Without a batch dimension: the same view fits images and batches.
        return vector.view(-1, 1, 1)
