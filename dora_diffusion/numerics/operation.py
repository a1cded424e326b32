"""Kinds of layers as one kind of object, so that the formula is written once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.numerics.precision import product_dtype


@dataclass(frozen=True)
class Operation:
    """A linear map with a weight ``(out, in, *k)``; this one is a Linear's.

    Attributes:
        channel_dim: Which dimension of an activation holds its channels.
    """

    channel_dim: ClassVar[int] = -1

    def __call__(self, x: Any, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the weight to ``x``, an activation; of an Embedding, ids as a `OneHot`."""
        return F.linear(x, weight, bias)

    def down_project(self, x: Any, down: Tensor) -> Tensor:
        """Apply ``down``, ``(r, in, *k)``."""
        return self(x, down)

    def up_project(self, x: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply ``up``, ``(out, r)`` or ``(out, r, *1)``, to what ``down`` made."""
        return F.linear(x, up, bias)

    def broadcast(self, vector: Tensor) -> Tensor:
        """Shape ``(channels,)`` to multiply an activation: its outputs."""
        return vector

    def scale_input(self, x: Any, vector: Tensor) -> Any:
        """``x`` times ``vector``, ``(in,)``: a value for each slice ``weight[:, i]``."""
        return x * vector

    def channel_sum(self, activation: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum an activation over all but its channels: ``(channels,)``."""
        activation = activation[None] if activation.ndim == 1 else activation
        dims = [d for d in range(activation.ndim) if d != self.channel_dim % activation.ndim]
        return torch.sum(activation, dims, dtype=dtype)


@dataclass(frozen=True)
class ConvOperation(Operation):
    """``x (N, in, *size)`` -> ``(N, out, *size')``, in one or two dimensions, zero padding.

    With ``groups``, output channels are in as many blocks that see one block of the inputs each.
    The weight is ``(out, in / groups, *k)``, and so is ``B A``: A is applied to each block, and B
    has a row for each output. LyCORIS has it so; in PEFT, A sees all inputs at once, which is an
    update that no grouped weight can hold.
    """

    channel_dim: ClassVar[int] = 1
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def down_project(self, x: Tensor, down: Tensor) -> Tensor:
        """Convolve with ``down``, every group alike: ``(N, groups * r, *size')``."""
        if self.groups == 1:
            return self(x, down)
        return self(x, down.repeat(self.groups, *[1] * (down.ndim - 1)))

    def up_project(self, x: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        """``up`` is a convolution of size 1 on what ``down`` made, whatever the stride was."""
        # Stride, padding and dilation were applied by A; applied twice, the sizes would not fit.
        plain = F.conv2d if len(self.stride) == 2 else F.conv1d
        return plain(x, up, bias, 1, 0, 1, self.groups)

    def broadcast(self, vector: Tensor) -> Tensor:
        """``(channels,)`` -> ``(channels, *1)``."""
        # Without a batch dimension: the same view fits images and batches.
        return vector.view(-1, *[1] * len(self.stride))

    def scale_input(self, x: Tensor, vector: Tensor) -> Tensor:
        """``vector`` is ``(in / groups,)``: channel i of every group is multiplied by value i."""
        return x * self.broadcast(vector if self.groups == 1 else vector.repeat(self.groups))


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: str | tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """``F.conv1d`` or ``F.conv2d``, whose weight gets a right gradient everywhere."""
    run: Any = F.conv2d if weight.ndim == 4 else F.conv1d
    trains = torch.is_grad_enabled() and weight.requires_grad
    if not (trains and leaves_garbage(x, weight, dilation)):
        made: Tensor = run(x, weight, bias, stride, padding, dilation, groups)
        return made
    low, bias = product_dtype(x), None if bias is None else bias.float()
    with torch.autocast(x.device.type, enabled=False):
        made = run(x.float(), weight.float(), bias, stride, padding, dilation, groups)
        return made.to(low)


def leaves_garbage(x: Tensor, weight: Tensor, dilation: Sequence[int]) -> bool:
    """Whether a convolution's weight gradient must be computed in float32.

    Where a kernel spans more than the map that it is applied to, oneDNN in bfloat16 leaves those
    taps of the gradient that only ever met padding as it found them in memory, with whatever
    numbers these were, NaN among them.

    Args:
        x: Input ``(N, in, *size)``, or without N.
        weight: ``(out, in, *k)``.
        dilation: Of each dimension of the kernel.
    """
    if x.device.type != "cpu" or product_dtype(x) != torch.bfloat16:
        return False
    kernel, size = weight.shape[2:], x.shape[2 - weight.ndim :]
    return any(d * (k - 1) + 1 > n for k, d, n in zip(kernel, dilation, size, strict=True))


@dataclass(frozen=True)
class OneHot:
    """Ids ``(...)`` as what an Embedding multiplies: vectors ``(..., num)``, 0 but at their id.

    Attributes:
        ids: Rows to look up, int64 or int32.
        values: What stands at the id, ``(...)``: 1 at first.
    """

    ids: Tensor
    values: Tensor

    @classmethod
    def of(cls, ids: Tensor, dtype: torch.dtype) -> OneHot:
        return cls(ids, torch.ones(ids.shape, dtype=dtype, device=ids.device))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def to(self, dtype: torch.dtype) -> OneHot:
        """The same in another dtype."""
        return OneHot(self.ids, self.values.to(dtype))

    def look_up(self, table: Tensor) -> Tensor:
        """The rows of a table ``(num, n)`` at the ids: ``(..., n)``; nothing else is read."""
        return F.embedding(self.ids, table)


class EmbeddingOperation(Operation):
    """``x (...)``, ids as a `OneHot` -> ``(..., dim)``: a Linear on one-hot vectors, without these.

    Its weight is the transposed table, ``(out, in) = (dim, num)``, as PEFT has it: outputs are the
    dimensions of a vector, inputs the rows of the table. On the output axis there is a magnitude
    for each dimension, on the input axis one for each row.
    """

    def __call__(self, x: OneHot, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Look up columns of ``weight``; an Embedding has no bias."""
        assert bias is None
        return x.look_up(weight.t()) * x.values[..., None]

    def scale_input(self, x: OneHot, vector: Tensor) -> OneHot:
        """Values times those of ``vector``, ``(num,)``, at the ids."""
        return OneHot(x.ids, x.values * x.look_up(vector[:, None])[..., 0])


def dropout(x: Tensor | OneHot, p: float, training: bool) -> Tensor | OneHot:
    """Inputs with some set to 0; an Embedding's, which are one-hot, with some tokens."""
    if not training or p == 0:
        return x
    if isinstance(x, OneHot):
        return OneHot(x.ids, F.dropout(x.values, p, training))
    return F.dropout(x, p, training)


# Pixels from which on a CPU takes less time for a convolution of each row than for groups.
_LARGE_MAP = 256


@dataclass(frozen=True)
class RowOperation(Operation):
    """Of a Linear or a Conv2d, on a batch whose rows have factors of their own.

    ``down`` is ``(N, r, in, *k)``, ``up`` ``(N, out, r)``; gains and biases are ``(N, channels)``.

    Attributes:
        op: What the weight, which all rows share, does.
        ndim: Dimensions of an activation, the first of which is the rows.
    """

    op: Operation
    ndim: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.op(x, weight, bias)

    def down_project(self, x: Tensor, down: Tensor) -> Tensor:
        """Each row by its own: a batched product, or a convolution with a group per row.

        oneDNN has no good kernels for so many groups: on a CPU, a kernel of one pixel is a product
        too, and large maps are convolved row after row, in down to half the time.
        """
        if not isinstance(self.op, ConvOperation):
            flat = x.reshape(x.shape[0], -1, x.shape[-1])
            return torch.bmm(flat, down.mT).view(*x.shape[:-1], -1)
        op, rows = self.op, x.shape[0]
        is_cpu, is_pixel = x.device.type == "cpu", down.shape[3:].numel() == 1
        if is_cpu and is_pixel and set(op.stride) == {1} and not any(op.padding):
            return self.up_project(x, down.flatten(2))
        if is_cpu and x.shape[2:].numel() >= _LARGE_MAP:
            each = zip(x[:, None].unbind(), down.unbind(), strict=True)
            return torch.cat([op(row, own) for row, own in each])
        side_by_side = x.reshape(1, -1, *x.shape[2:])
        made = convolve(
            side_by_side, down.flatten(0, 1), None, op.stride, op.padding, op.dilation, rows
        )
        return made.view(rows, -1, *made.shape[2:])

    def up_project(self, x: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        """A batched product on what ``down`` made."""
        if isinstance(self.op, ConvOperation):
            flat = x.flatten(2)
            made = torch.bmm(up, flat) if bias is None else torch.baddbmm(bias[..., None], up, flat)
            return made.view(x.shape[0], -1, *x.shape[2:])
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        made = torch.bmm(flat, up.mT) if bias is None else torch.baddbmm(bias[:, None], flat, up.mT)
        return made.view(*x.shape[:-1], -1)

    def broadcast(self, vector: Tensor) -> Tensor:
        """``(N, channels)`` to multiply an activation."""
        shape = [vector.shape[0], *[1] * (self.ndim - 1)]
        shape[self.op.channel_dim] = -1
        return vector.view(shape)

    def scale_input(self, x: Tensor, vector: Tensor) -> Tensor:
        """``vector`` is ``(N, in)``."""
        return x * self.broadcast(vector)

    def channel_sum(self, activation: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum each row over all but its channels: ``(N, channels)``."""
        kept = (0, self.op.channel_dim % self.ndim)
        dims = [d for d in range(self.ndim) if d not in kept]
        # An empty list would mean all of them.
        return torch.sum(activation, dims, dtype=dtype) if dims else activation.to(dtype)
