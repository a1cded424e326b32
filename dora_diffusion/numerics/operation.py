"""Kinds of layers as one kind of object, so that the formula is written once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.numerics.precision import product_dtype

# Dimensions of a sum over all but the last, by how many there are; torch has no more than 64.
_LEADING = tuple(tuple(range(max(0, ndim - 1))) for ndim in range(65))


class Operation:
    """A linear map with a weight ``(out, in, *k)``; this one is a Linear's.

    What it does to an activation are torch's own functions, with the layer's settings bound to
    them: nothing else is called on the way.

    Attributes:
        apply: ``x``, an activation, or ids as a `OneHot`, the weight, and perhaps a bias ``(out,)``
            to the output.
        down_project: ``x`` and ``down``, ``(r, in, *k)``, to what B is applied to.
        up_project: That, ``up``, ``(out, r)`` or ``(out, r, *1)``, and perhaps a bias.
        shape: What a vector over outputs is viewed as to multiply an activation.
        dims: Over which dimensions of an activation its channels are summed, by how many it has;
            none: it is the sum.
    """

    apply: Callable[..., Tensor] = staticmethod(F.linear)
    down_project: Callable[..., Tensor] = staticmethod(F.linear)
    up_project: Callable[..., Tensor] = staticmethod(F.linear)
    shape: tuple[int, ...] = (-1,)
    dims: Mapping[int, tuple[int, ...]] | Sequence[tuple[int, ...]] = _LEADING

    def scale_input(self, x: Any, vector: Tensor) -> Any:
        """``x`` times ``vector``, ``(in,)``: a value for each slice ``weight[:, i]``."""
        return x * vector.view(self.shape)


class ConvOperation(Operation):
    """``x (N, in, *size)``, or without N, -> ``(N, out, *size')``, zero padding, in one or two
    dimensions.

    With ``groups``, output channels are in as many blocks that see one block of the inputs each.
    The weight is ``(out, in / groups, *k)``, and so is ``B A``: A is applied to each block, and B
    has a row for each output. LyCORIS has it so; in PEFT, A sees all inputs at once, which is an
    update that no grouped weight can hold. B is a convolution of size 1 on what A made: stride,
    padding and dilation were applied by A; applied twice, the sizes would not fit.

    Args:
        stride, padding, dilation, groups: The layer's.
        leaves_garbage: Whether `convolve` must look after the gradient of A.
    """

    def __init__(
        self,
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] = (0, 0),
        dilation: tuple[int, ...] = (1, 1),
        groups: int = 1,
        *,
        leaves_garbage: bool = True,
    ) -> None:
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        size = len(stride)
        run: Any = F.conv2d if size == 2 else F.conv1d
        settings: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        }
        self.apply = partial(run, **settings)
        own = partial(convolve, bias=None, **settings) if leaves_garbage else self.apply
        self.down_project = partial(_down_groups, own, groups) if groups > 1 else own
        self.up_project = partial(run, groups=groups)
        self.shape = (-1, *[1] * size)
        self.dims = {size + 1: tuple(range(1, size + 1)), size + 2: (0, *range(2, size + 2))}

    def scale_input(self, x: Tensor, vector: Tensor) -> Tensor:
        """``vector`` is ``(in / groups,)``: channel i of every group is multiplied by value i."""
        return x * vector.repeat(self.groups).view(self.shape)


def _down_groups(own: Callable[..., Tensor], groups: int, x: Tensor, down: Tensor) -> Tensor:
    """Convolve with ``down``, every group alike: ``(N, groups * r, *size')``."""
    return own(x, down.repeat(groups, *[1] * (down.ndim - 1)))


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
    """Return whether a convolution's weight gradient must be computed in float32.

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

    def apply(self, x: OneHot, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Look up columns of ``weight``; an Embedding has no bias."""
        assert bias is None
        return x.look_up(weight.t()) * x.values[..., None]

    down_project = apply

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


def timestep_ranks(timesteps: Tensor, num_train_timesteps: int, rank: int, least: int) -> Tensor:
    """T-LoRA's active ranks, ``floor((T - t) / T (r - r_min)) + r_min`` (arXiv:2507.05964, 4.1).

    Args:
        timesteps: t, ``(B,)`` int64, from 0, where all ranks are active.
        num_train_timesteps: T.
        rank: r of the layer.
        least: r_min, no more than r.

    Returns:
        ``(B,)`` int64.
    """
    left = num_train_timesteps - timesteps
    return (left * (rank - least)).div(num_train_timesteps, rounding_mode="floor") + least


def by_row(op: Operation, vectors: Tensor, activation: Tensor) -> Tensor:
    """View ``(N, c)`` to multiply an activation of N rows; ``(1, c)`` is for any number.

    Channels that are several times as many, as with groups, repeat it.
    """
    channels = activation.ndim - len(op.shape) + op.shape.index(-1)
    shape = [len(vectors), *[1] * (activation.ndim - 1)]
    shape[channels] = -1
    return vectors.repeat(1, activation.shape[channels] // vectors.shape[1]).view(shape)


class MaskedOperation(Operation):
    """Another operation, of which what A makes is multiplied by a number for each rank and row.

    Args:
        op: The other.
        mask: Of each row, as `by_row` takes it.
    """

    def __init__(self, op: Operation, mask: Tensor) -> None:
        self.op, self.mask = op, mask
        self.apply, self.up_project, self.shape, self.dims = (
            op.apply, op.up_project, op.shape, op.dims,
        )  # fmt: skip

    def scale_input(self, x: Any, vector: Tensor) -> Any:
        """As the other operation does it."""
        return self.op.scale_input(x, vector)

    def down_project(self, x: Any, down: Tensor) -> Tensor:
        """The product with ``down``, times the mask."""
        made = self.op.down_project(x, down)
        return made * by_row(self, self.mask, made).to(made.dtype)


# Pixels from which on a CPU takes less time for a convolution of each row than for groups.
_LARGE_MAP = 256


class RowOperation(Operation):
    """Operation of a Linear or a Conv2d, on a batch whose rows have factors of their own.

    ``down`` is ``(N, r, in, *k)``, ``up`` ``(N, out, r)``; gains and biases are ``(N, channels)``.

    Args:
        op: What the weight, which all rows share, does.
        ndim: Dimensions of an activation, the first of which is the rows.
        rows: N.
    """

    def __init__(self, op: Operation, ndim: int, rows: int) -> None:
        self.op, self.apply = op, op.apply
        self._conv = op if isinstance(op, ConvOperation) else None
        channels = 1 if self._conv else ndim - 1
        shape = [rows, *[1] * (ndim - 1)]
        shape[channels] = -1
        self.shape = tuple(shape)
        self.dims = {ndim: tuple(d for d in range(1, ndim) if d != channels)}

    def down_project(self, x: Tensor, down: Tensor) -> Tensor:
        """Each row by its own: a batched product, or a convolution with a group per row.

        oneDNN has no good kernels for so many groups: on a CPU, a kernel of one pixel is a product
        too, and large maps are convolved row after row, in down to half the time.
        """
        op = self._conv
        if op is None:
            flat = x.reshape(x.shape[0], -1, x.shape[-1])
            return torch.bmm(flat, down.mT).view(*x.shape[:-1], -1)
        is_cpu, is_pixel = x.device.type == "cpu", down.shape[3:].numel() == 1
        if is_cpu and is_pixel and set(op.stride) == {1} and not any(op.padding):
            return self.up_project(x, down.flatten(2))
        if is_cpu and x.shape[2:].numel() >= _LARGE_MAP:
            each = zip(x[:, None].unbind(), down.unbind(), strict=True)
            return torch.cat([op.down_project(row, own) for row, own in each])
        side_by_side, rows = x.reshape(1, -1, *x.shape[2:]), x.shape[0]
        made = convolve(
            side_by_side, down.flatten(0, 1), None, op.stride, op.padding, op.dilation, rows
        )
        return made.view(rows, -1, *made.shape[2:])

    def up_project(self, x: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        """A batched product on what ``down`` made."""
        if self._conv:
            flat = x.flatten(2)
            made = torch.bmm(up, flat) if bias is None else torch.baddbmm(bias[..., None], up, flat)
            return made.view(x.shape[0], -1, *x.shape[2:])
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        made = torch.bmm(flat, up.mT) if bias is None else torch.baddbmm(bias[:, None], flat, up.mT)
        return made.view(*x.shape[:-1], -1)
