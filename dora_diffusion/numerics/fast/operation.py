"""The gradients of a Linear and a Conv2d.

The plain operations are `numerics.operation`'s; `with_gradients` gives them these.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.numerics.fast.product import linear, matrix_product, suits_onednn
from dora_diffusion.numerics.operation import (
    ConvOperation,
    LinearOperation,
    Operation,
    leaves_garbage,
)

aten = torch.ops.aten


# Below this many positions per output channel, a convolution's input gradient on a CPU is faster as
# one product of matrices: the library's convolutions first copy the weight into a layout of theirs.
FEW_POSITIONS = 1 / 2


class FastOperation(Operation, Protocol):
    """An operation with its gradients, for a weight ``(out, in, *k)``.

    All but `apply` take activations, and give gradients of them, as `flat` has them.
    """

    @property
    def up(self) -> FastOperation:
        """The operation that ``up`` (``(out, r)`` or ``(out, r, 1, 1)``) is applied with."""

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The operation itself, without autograd."""

    def flat(self, activation: Tensor) -> Tensor:
        """A Linear's as ``(positions, channels)``; a convolution's as it is."""

    def input_gradient(self, grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """Gradient of ``x`` from the gradient of the output."""

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``x`` and of ``weight``."""

    def weight_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, grad_x: Tensor | None = None
    ) -> Tensor:
        """Gradient of ``weight``; that of ``x`` is added to ``grad_x`` if there is one."""

    def channel_sum(self, activation: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum an activation over all but its channels, ``(channels,)``."""

    def select(self, activation: Tensor, channels: Tensor) -> Tensor:
        """Take some channels of an activation."""


def serves(op: Operation) -> bool:
    """Whether there are gradients for it: it is a Linear, or a Conv2d with one group."""
    if isinstance(op, ConvOperation):
        return op.groups == 1 and len(op.stride) == 2
    return isinstance(op, LinearOperation)


@lru_cache
def with_gradients(op: Operation) -> FastOperation:
    """A Linear or Conv2d with its gradients."""
    assert serves(op)
    if isinstance(op, ConvOperation):
        return FastConv2d(op.stride, op.padding, op.dilation)
    return _LINEAR


class FastLinear(LinearOperation):
    """``x (..., in)`` -> ``(..., out)``."""

    @property
    def up(self) -> FastLinear:
        """A Linear's low-rank factors are both Linears."""
        return self

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x @ weight.T``."""
        return linear(x, weight)

    def flat(self, activation: Tensor) -> Tensor:
        """``(..., channels)`` -> ``(positions, channels)``."""
        return activation.reshape(-1, activation.shape[-1])

    def input_gradient(self, grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """``grad @ weight``."""
        return matrix_product(grad, weight)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Two products."""
        return self.input_gradient(grad, weight, x), self.weight_gradient(grad, x, weight)

    def weight_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, grad_x: Tensor | None = None
    ) -> Tensor:
        """``grad.T @ x``, and ``grad_x += grad @ weight``."""
        if grad_x is not None:
            grad_x.addmm_(grad, weight)
        # The same product, but faster where the thin matrix comes first. Elsewhere than with oneDNN
        # it is no faster, and the result is better off without being transposed.
        if grad.shape[1] > x.shape[1] and suits_onednn(grad, x):
            return matrix_product(x.t(), grad).t()
        return matrix_product(grad.t(), x)

    def channel_sum(self, activation: Tensor, dtype: torch.dtype) -> Tensor:
        """``(positions, channels)`` -> ``(channels,)``."""
        return torch.sum(activation, 0, dtype=dtype)

    def select(self, activation: Tensor, channels: Tensor) -> Tensor:
        """Channels are the last dimension."""
        return activation[:, channels]


class FastConv2d(ConvOperation):
    """``x (N, in, H, W)`` -> ``(N, out, H', W')``, zero padding, one group."""

    @property
    def up(self) -> FastConv2d:
        """``up`` is a 1x1 convolution on what ``down`` made, whatever the stride was."""
        return _POINTWISE

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve."""
        return self(x, weight)

    def flat(self, activation: Tensor) -> Tensor:
        """``(N, channels, H, W)``."""
        return activation

    def _backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
    ) -> tuple[Tensor, Tensor]:
        mask = (of_x, of_weight, False)
        gradients: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, (0, 0), 1, mask
        )
        return gradients[0], gradients[1]

    def input_gradient(self, grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """The transposed convolution."""
        if self._is_few(grad, x, weight):
            # One product of matrices, whose columns are then summed into the map (col2im). In this
            # order, with the columns last, it is much faster.
            rows = grad.flatten(2).mT
            columns = matrix_product(rows.reshape(-1, rows.shape[2]), weight.flatten(1))
            return self._sum_taps(columns.view(*rows.shape[:2], columns.shape[1]).mT, x, weight)
        return self._backward(grad, x, weight, True, False)[0]

    def _is_few(self, grad: Tensor, x: Tensor, weight: Tensor) -> bool:
        if x.device.type != "cpu" or not x.is_contiguous():
            return False
        return grad.shape[0] * math.prod(grad.shape[2:]) <= FEW_POSITIONS * weight.shape[0]

    def _sum_taps(self, columns: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Sum ``(N, channels * taps, positions)`` into maps of the size of ``x``."""
        # Compared by value: a 1x1 kernel with a stride or padding still has to be placed.
        if weight.shape[2:].numel() == 1 and self == _POINTWISE:
            return columns.reshape(x.shape[0], columns.shape[1], *x.shape[2:])
        kernel = weight.shape[2], weight.shape[3]
        return F.fold(columns, x.shape[2:], kernel, self.dilation, self.padding, self.stride)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Both in one operation, but where a CPU is better or only right with two."""
        if self._is_few(grad, x, weight) or leaves_garbage(x, weight, self.dilation):
            return self.input_gradient(grad, weight, x), self.weight_gradient(grad, x, weight)
        return self._backward(grad, x, weight, True, True)

    def weight_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, grad_x: Tensor | None = None
    ) -> Tensor:
        """The correlation of input and output gradient, and ``grad_x +=`` that of the input."""
        if grad_x is not None:
            added, gradient = self.gradients(grad, x, weight)
            grad_x += added
            return gradient
        if leaves_garbage(x, weight, self.dilation):
            wide = self._backward(grad.float(), x.float(), weight.float(), False, True)[1]
            return wide.to(x.dtype)
        return self._backward(grad, x, weight, False, True)[1]

    def channel_sum(self, activation: Tensor, dtype: torch.dtype) -> Tensor:
        """``(N, channels, H, W)`` -> ``(channels,)``."""
        return torch.sum(activation, (0, 2, 3), dtype=dtype)

    def select(self, activation: Tensor, channels: Tensor) -> Tensor:
        """Channels are the second dimension."""
        return activation[:, channels]


_LINEAR = FastLinear()
_POINTWISE = FastConv2d()
