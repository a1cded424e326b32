"""Linear and Conv2d as one kind of object: the operation, and its two gradients.

The DoRA functions are written once against these, so that a layer kind is data and not a second
copy of the formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class Operation(Protocol):
    """A linear map with a weight ``(out, in, *k)``."""

    @property
    def pointwise(self) -> Operation:
        """The operation that ``up`` (``(out, r)`` or ``(out, r, 1, 1)``) is applied with."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the weight to ``x``."""

    def input_gradient(self, grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """Gradient of ``x`` from the gradient of the output."""

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of ``weight`` from the gradient of the output."""

    def broadcast(self, vector: Tensor) -> Tensor:
        """Shape ``(channels,)`` to multiply an activation."""

    def channel_sum(self, activation: Tensor) -> Tensor:
        """Sum an activation over all but its channels, in float32 or wider: ``(channels,)``."""

    def select(self, activation: Tensor, channels: Tensor) -> Tensor:
        """Take some channels of an activation."""

    def positions(self, x: Tensor, weight: Tensor) -> int:
        """How many times the weight is applied to ``x``."""


@dataclass(frozen=True)
class LinearOperation:
    """``x (..., in)`` -> ``(..., out)``."""

    @property
    def pointwise(self) -> LinearOperation:
        """A Linear's low-rank factors are both Linears."""
        return self

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias``."""
        return F.linear(x, weight, bias)

    def input_gradient(self, grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """``grad @ weight``."""
        return grad @ weight

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """``grad.T @ x`` over all leading dimensions."""
        return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])

    def broadcast(self, vector: Tensor) -> Tensor:
        """Channels are last already."""
        return vector

    def channel_sum(self, activation: Tensor) -> Tensor:
        """``(..., channels)`` -> ``(channels,)``."""
        return activation.reshape(-1, activation.shape[-1]).sum(dim=0, dtype=_sum_dtype(activation))

    def select(self, activation: Tensor, channels: Tensor) -> Tensor:
        """Channels are the last dimension."""
        return activation[..., channels]

    def positions(self, x: Tensor, weight: Tensor) -> int:
        """Rows of ``x``."""
        return math.prod(x.shape[:-1])


@dataclass(frozen=True)
class Conv2dOperation:
    """``x (N, in, H, W)`` -> ``(N, out, H', W')``, zero padding, one group."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def pointwise(self) -> Conv2dOperation:
        """``up`` is a 1x1 convolution on what ``down`` made, whatever the stride was."""
        return _POINTWISE

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve."""
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, of_input: bool) -> Tensor:
        mask = (of_input, not of_input, False)
        gradients = aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, (0, 0), 1, mask
        )
        gradient: Tensor = gradients[0 if of_input else 1]
        return gradient

    def input_gradient(self, grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """The transposed convolution."""
        return self._backward(grad, x, weight, of_input=True)

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The correlation of input and output gradient."""
        return self._backward(grad, x, weight, of_input=False)

    def broadcast(self, vector: Tensor) -> Tensor:
        """``(channels,)`` -> ``(channels, 1, 1)``."""
        return vector.view(-1, 1, 1)

    def channel_sum(self, activation: Tensor) -> Tensor:
        """``(N, channels, H, W)`` -> ``(channels,)``."""
        return activation.sum(dim=(0, 2, 3), dtype=_sum_dtype(activation))

    def select(self, activation: Tensor, channels: Tensor) -> Tensor:
        """Channels are the second dimension."""
        return activation[:, channels]

    def positions(self, x: Tensor, weight: Tensor) -> int:
        """Pixels of the output, over the batch."""
        count = x.shape[0]
        for dim in (0, 1):
            span = self.dilation[dim] * (weight.shape[2 + dim] - 1) + 1
            count *= (x.shape[2 + dim] + 2 * self.padding[dim] - span) // self.stride[dim] + 1
        return count


_POINTWISE = Conv2dOperation()
