"""The gradients of a Linear and a Conv2d, and cheaper ways to apply ``A``, whose rows are few.

The plain operations are `numerics.operation`'s; `with_gradients` gives them these.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.numerics.fast.product import matrix_product
from dora_diffusion.numerics.operation import Conv2dOperation, LinearOperation, Operation
from dora_diffusion.numerics.precision import is_wide, wide_dtype

aten = torch.ops.aten


# Below this many positions per output channel, a convolution's input gradient on a CPU is faster as
# one product of matrices: the library's convolutions first copy the weight into a layout of theirs.
FEW_POSITIONS = 1 / 2


class FastOperation(Operation, Protocol):
    """An operation with its gradients, for a weight ``(out, in, *k)``."""

    @property
    def up(self) -> FastOperation:
        """The operation that ``up`` (``(out, r)`` or ``(out, r, 1, 1)``) is applied with."""

    def input_gradient(self, grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """Gradient of ``x`` from the gradient of the output."""

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of ``weight`` from the gradient of the output."""

    def down_project(self, x: Tensor, down: Tensor) -> Tensor:
        """Apply ``down``, whose few output channels allow a cheaper way than a full weight's."""

    def down_project_gradients(
        self, grad: Tensor, x: Tensor, down: Tensor, grad_x: Tensor | None
    ) -> Tensor:
        """Gradient of ``down``; that of ``x`` through it is added to ``grad_x`` if there is one."""

    def channel_sum(self, activation: Tensor) -> Tensor:
        """Sum an activation over all but its channels, in float32 or wider: ``(channels,)``."""

    def select(self, activation: Tensor, channels: Tensor) -> Tensor:
        """Take some channels of an activation."""

    def positions(self, x: Tensor, weight: Tensor) -> int:
        """How many times the weight is applied to ``x``."""


def with_gradients(op: Operation) -> FastOperation:
    """A Linear or Conv2d with its gradients."""
    if isinstance(op, Conv2dOperation):
        return FastConv2d(op.stride, op.padding, op.dilation)
    return FastLinear()


class FastLinear(LinearOperation):
    """``x (..., in)`` -> ``(..., out)``."""

    @property
    def up(self) -> FastLinear:
        """A Linear's low-rank factors are both Linears."""
        return self

    def input_gradient(self, grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """``grad @ weight``."""
        return matrix_product(_rows(grad), weight).view(*grad.shape[:-1], weight.shape[1])

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """``grad.T @ x`` over all leading dimensions."""
        left, right = _rows(grad), _rows(x)
        # The same product, but faster where the thin matrix comes first.
        if left.shape[1] > right.shape[1]:
            return matrix_product(right.t(), left).t()
        return matrix_product(left.t(), right)

    def down_project(self, x: Tensor, down: Tensor) -> Tensor:
        """``x @ down.T``."""
        return matrix_product(_rows(x), down.t()).view(*x.shape[:-1], down.shape[0])

    def down_project_gradients(
        self, grad: Tensor, x: Tensor, down: Tensor, grad_x: Tensor | None
    ) -> Tensor:
        """``grad.T @ x``, and ``grad_x += grad @ down``."""
        if grad_x is not None:
            grad_x.view(-1, grad_x.shape[-1]).addmm_(_rows(grad), down)
        return self.weight_gradient(grad, x, down)

    def channel_sum(self, activation: Tensor) -> Tensor:
        """``(..., channels)`` -> ``(channels,)``."""
        return _rows(activation).sum(dim=0, dtype=wide_dtype(activation))

    def select(self, activation: Tensor, channels: Tensor) -> Tensor:
        """Channels are the last dimension."""
        return activation[..., channels]

    def positions(self, x: Tensor, weight: Tensor) -> int:
        """Rows of ``x``."""
        return math.prod(x.shape[:-1])


class FastConv2d(Conv2dOperation):
    """``x (N, in, H, W)`` -> ``(N, out, H', W')``, zero padding, one group."""

    @property
    def up(self) -> FastConv2d:
        """``up`` is a 1x1 convolution on what ``down`` made, whatever the stride was."""
        return _POINTWISE

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, of_input: bool) -> Tensor:
        mask = (of_input, not of_input, False)
        gradients = aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, (0, 0), 1, mask
        )
        gradient: Tensor = gradients[0 if of_input else 1]
        return gradient

    def input_gradient(self, grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """The transposed convolution."""
        few = grad.shape[0] * math.prod(grad.shape[2:]) <= FEW_POSITIONS * weight.shape[0]
        if few and x.device.type == "cpu" and x.is_contiguous():
            # One product of matrices, whose columns are then summed into the map (col2im). In this
            # order, with the columns last, it is much faster.
            rows = grad.flatten(2).mT
            columns = matrix_product(rows.reshape(-1, rows.shape[2]), weight.flatten(1))
            return self._sum_taps(columns.view(*rows.shape[:2], columns.shape[1]).mT, x, weight)
        return self._backward(grad, x, weight, of_input=True)

    def _sum_taps(self, columns: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Sum ``(N, channels * taps, positions)`` into maps of the size of ``x``."""
        if self._is_product(weight):
            return columns.reshape(x.shape[0], columns.shape[1], *x.shape[2:])
        kernel = weight.shape[2], weight.shape[3]
        return F.fold(columns, x.shape[2:], kernel, self.dilation, self.padding, self.stride)

    def _is_product(self, weight: Tensor) -> bool:
        """Whether every position is multiplied on its own."""
        # Compared by value: a 1x1 kernel with a stride or padding still has to be placed.
        return weight.shape[2:].numel() == 1 and self == _POINTWISE

    def _is_thin(self, x: Tensor, down: Tensor) -> bool:
        """Whether ``down`` is cheaper as one product of matrices with shifted results.

        Its results are shifted rather than ``x``, which is many times larger. Not in low precision,
        where the sum over the taps would be rounded at each of them.
        """
        same = all(
            2 * self.padding[i] == self.dilation[i] * (down.shape[2 + i] - 1) for i in (0, 1)
        )
        return (
            same
            and self.stride == (1, 1)
            and is_wide(x.dtype)
            and x.is_contiguous()
            and down.shape[0] * down.shape[2:].numel() <= down.shape[1]
        )

    def down_project(self, x: Tensor, down: Tensor) -> Tensor:
        """Convolve with few output channels."""
        if not self._is_thin(x, down):
            return self(x, down)
        # im2col would copy x once for every tap; this copies its r-wide products instead.
        return self._sum_taps(_taps(down) @ x.flatten(2), x, down)

    def down_project_gradients(
        self, grad: Tensor, x: Tensor, down: Tensor, grad_x: Tensor | None
    ) -> Tensor:
        """Both gradients of a convolution with few output channels, from one set of shifts."""
        if not self._is_thin(x, down):
            if grad_x is not None:
                grad_x += self.input_gradient(grad, down, x)
            return self.weight_gradient(grad, x, down)
        rank, _, height, width = down.shape
        shifted = grad.flatten(2)
        if not self._is_product(down):
            shifted = F.unfold(grad, (height, width), self.dilation, self.padding)
        if grad_x is not None:
            across = _taps(down).t().expand(x.shape[0], -1, -1)
            grad_x.view(*x.shape[:2], shifted.shape[2]).baddbmm_(across, shifted)
        # Shifting grad instead of x turns the kernel by 180 degrees, which the flip undoes.
        grad_taps = (shifted @ x.flatten(2).mT).sum(dim=0)
        return grad_taps.view(rank, height, width, -1).flip(1, 2).permute(0, 3, 1, 2)

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The correlation of input and output gradient."""
        small = any(x.shape[2 + i] < self._reach(weight, i) for i in (0, 1))
        if small and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            # oneDNN leaves taps there that only ever met padding as it found them in memory, with
            # whatever numbers these were, NaN among them. Its float32 is right.
            return self._backward(grad.float(), x.float(), weight.float(), False).to(x.dtype)
        return self._backward(grad, x, weight, of_input=False)

    def channel_sum(self, activation: Tensor) -> Tensor:
        """``(N, channels, H, W)`` -> ``(channels,)``."""
        return activation.sum(dim=(0, 2, 3), dtype=wide_dtype(activation))

    def select(self, activation: Tensor, channels: Tensor) -> Tensor:
        """Channels are the second dimension."""
        return activation[:, channels]

    def positions(self, x: Tensor, weight: Tensor) -> int:
        """Pixels of the output, over the batch."""
        count = x.shape[0]
        for dim in (0, 1):
            free = x.shape[2 + dim] + 2 * self.padding[dim] - self._reach(weight, dim)
            count *= free // self.stride[dim] + 1
        return count

    def _reach(self, weight: Tensor, dim: int) -> int:
        """How many pixels the kernel spans, from its first tap to its last."""
        return self.dilation[dim] * (weight.shape[2 + dim] - 1) + 1


_POINTWISE = FastConv2d()


def _rows(activation: Tensor) -> Tensor:
    """``(..., channels)`` -> ``(positions, channels)``."""
    return activation.reshape(-1, activation.shape[-1])


def _taps(down: Tensor) -> Tensor:
    """``(r, in, kh, kw)`` -> ``(r * kh * kw, in)``, turned by 180 degrees: from input to output."""
    return down.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, down.shape[1])
