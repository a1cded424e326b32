"""Operations of layers behind one interface, so that formulas are written once for all kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.numerics.precision import product_dtype


class Operation:
    """Linear map with a weight ``(out, in, *k)``. The base class is the operation of a Linear.

    Its attributes are functions of torch with the settings of a layer bound, so that calls have no
    overhead.

    Attributes:
        apply: Function of ``x`` (an activation or a `OneHot`), the weight and an optional bias
            ``(out,)`` to the output.
        down_project: Function of ``x`` and ``down`` ``(r, in, *k)`` to the input of B.
        up_project: Function of the input of B, ``up`` ``(out, r)`` or ``(out, r, *1)`` and an
            optional bias to the output.
        shape: Shape of a vector over outputs to multiply an activation.
        is_plain: True for a Linear and for a Conv2d without groups. Only these have a fused forward
            (`numerics.fused`) and a `RowOperation`.
    """

    apply: Callable[..., Tensor] = staticmethod(F.linear)
    down_project: Callable[..., Tensor] = staticmethod(F.linear)
    up_project: Callable[..., Tensor] = staticmethod(F.linear)
    shape: tuple[int, ...] = (-1,)
    is_plain = True

    def scale_input(self, x: Any, vector: Tensor) -> Any:
        """Multiply ``x`` by ``vector`` ``(in,)``, one value for each slice ``weight[:, i]``."""
        return (x * vector.view(self.shape)).to(x.dtype)


class ConvOperation(Operation):
    """Convolution in one or two dimensions with zero padding.

    It maps ``(N, in, *size)``, or an input without N, to ``(N, out, *size')``. With ``groups``, the
    weight is ``(out, in / groups, *k)``, and so is ``B A``: A is applied to each group of inputs,
    and B has a row for each output. LyCORIS does the same; in PEFT, A is applied to all inputs,
    which no grouped weight can represent. A has the stride, padding and dilation of the layer; B is
    a convolution of size 1.

    Args:
        stride, padding, dilation, groups: Settings of the layer.
    """

    def __init__(
        self,
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] = (0, 0),
        dilation: tuple[int, ...] = (1, 1),
        groups: int = 1,
    ) -> None:
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        size = len(stride)
        self.is_plain = groups == 1 and size == 2
        run: Any = F.conv2d if size == 2 else F.conv1d
        settings: Any = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        }
        self.apply = partial(run, **settings)
        down = partial(convolve, bias=None, **settings)
        self.down_project = partial(_down_groups, down, groups) if groups > 1 else down
        self.up_project = partial(run, groups=groups)
        self.shape = (-1, *[1] * size)

    def scale_input(self, x: Tensor, vector: Tensor) -> Tensor:
        """Multiply channel i of every group by value i of ``vector`` ``(in / groups,)``."""
        return (x * vector.repeat(self.groups).view(self.shape)).to(x.dtype)


def _down_groups(
    convolution: Callable[..., Tensor], groups: int, x: Tensor, down: Tensor
) -> Tensor:
    """Convolve every group with ``down``: ``(N, groups * r, *size')``."""
    return convolution(x, down.repeat(groups, *[1] * (down.ndim - 1)))


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: str | tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Apply ``F.conv1d`` or ``F.conv2d`` with a correct weight gradient on all devices."""
    run: Any = F.conv2d if weight.ndim == 4 else F.conv1d
    trains = torch.is_grad_enabled() and weight.requires_grad
    if not (trains and leaves_garbage(x, weight, dilation)):
        output: Tensor = run(x, weight, bias, stride, padding, dilation, groups)
        return output
    low, bias = product_dtype(x), None if bias is None else bias.float()
    with torch.autocast(x.device.type, enabled=False):
        output = run(x.float(), weight.float(), bias, stride, padding, dilation, groups)
        return output.to(low)


def leaves_garbage(x: Tensor, weight: Tensor, dilation: Sequence[int]) -> bool:
    """Return whether the weight gradient of a convolution must be computed in float32.

    If a kernel is larger than its input, oneDNN in bfloat16 does not write the gradient of taps
    that only meet padding. These entries keep arbitrary values of uninitialized memory, even NaN.

    Args:
        x: Input ``(N, in, *size)``, or without N.
        weight: Weight ``(out, in, *k)``.
        dilation: Dilation of each dimension of the kernel.
    """
    if x.device.type != "cpu" or product_dtype(x) != torch.bfloat16:
        return False
    kernel, size = weight.shape[2:], x.shape[2 - weight.ndim :]
    return any(d * (k - 1) + 1 > n for k, d, n in zip(kernel, dilation, size, strict=True))


@dataclass(frozen=True)
class OneHot:
    """Ids ``(...)`` as scaled one-hot vectors ``(..., num)``, which an Embedding multiplies.

    Attributes:
        ids: Rows to look up, int64 or int32.
        values: Values at the ids, ``(...)``, initially 1.
    """

    ids: Tensor
    values: Tensor

    @classmethod
    def of(cls, ids: Tensor, dtype: torch.dtype) -> OneHot:
        return cls(ids, torch.ones(ids.shape, dtype=dtype, device=ids.device))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def look_up(self, table: Tensor) -> Tensor:
        """Look up rows of a table ``(num, n)``: ``(..., n)``."""
        return F.embedding(self.ids, table)


class EmbeddingOperation(Operation):
    """Operation of an Embedding: a Linear on one-hot vectors, ``(...)`` to ``(..., dim)``.

    The weight is the transposed table, ``(out, in) = (dim, num)``, as in PEFT: outputs are the
    dimensions of a vector, inputs the rows of the table. The output axis has a magnitude for each
    dimension, the input axis one for each row.
    """

    def apply(self, x: OneHot, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Look up columns of ``weight``. There is no bias."""
        assert bias is None
        return x.look_up(weight.t()) * x.values[..., None]

    down_project = apply
    is_plain = False

    def scale_input(self, x: OneHot, vector: Tensor) -> OneHot:
        """Multiply the values by the entries of ``vector`` ``(num,)`` at the ids."""
        return OneHot(x.ids, (x.values * x.look_up(vector[:, None])[..., 0]).to(x.dtype))


def dropout(x: Tensor | OneHot, p: float, training: bool) -> Tensor | OneHot:
    """Apply dropout to inputs, or to whole tokens for an Embedding."""
    if not training or p == 0:
        return x
    if isinstance(x, OneHot):
        return OneHot(x.ids, F.dropout(x.values, p, training))
    return F.dropout(x, p, training)


# Number of pixels from which a CPU convolves row by row faster than with groups.
_LARGE_MAP = 256


class RowOperation(Operation):
    """Operation of a Linear or Conv2d on a batch in which each row has its own factors.

    ``down`` is ``(N, r, in, *k)``, ``up`` ``(N, out, r)``; gains and biases are ``(N, channels)``.

    Args:
        op: Operation of the weight, which all rows share.
        ndim: Number of dimensions of an activation. The first one is the rows.
        rows: Number of rows N.
    """

    is_plain = False

    def __init__(self, op: Operation, ndim: int, rows: int) -> None:
        self.apply, ones = op.apply, (1,) * (ndim - 2)
        self._conv = op if isinstance(op, ConvOperation) else None
        self.shape = (rows, -1, *ones) if self._conv else (rows, *ones, -1)

    def down_project(self, x: Tensor, down: Tensor) -> Tensor:
        """Project each row with its own factor: a batched product, or a grouped convolution.

        oneDNN is slow with many groups. On a CPU, kernels of one pixel are batched products, and
        large inputs are convolved row by row, in up to half the time.
        """
        op = self._conv
        if op is None:
            flat = x.reshape(x.shape[0], -1, x.shape[-1])
            return torch.bmm(flat, down.mT).view(*x.shape[:-1], -1)
        is_cpu, is_pixel = x.device.type == "cpu", down.shape[3:].numel() == 1
        if is_cpu and is_pixel and set(op.stride) == {1} and not any(op.padding):
            return self.up_project(x, down.flatten(2))
        if is_cpu and x.shape[2:].numel() >= _LARGE_MAP:
            pairs = zip(x[:, None].unbind(), down.unbind(), strict=True)
            return torch.cat([op.down_project(row, factor) for row, factor in pairs])
        side_by_side, rows = x.reshape(1, -1, *x.shape[2:]), x.shape[0]
        output = convolve(
            side_by_side, down.flatten(0, 1), None, op.stride, op.padding, op.dilation, rows
        )
        return output.view(rows, -1, *output.shape[2:])

    def up_project(self, x: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        """Project each row of the down projection with its own factor, by a batched product."""
        if self._conv:
            flat = x.flatten(2)
            y = torch.bmm(up, flat) if bias is None else torch.baddbmm(bias[..., None], up, flat)
            return y.view(x.shape[0], -1, *x.shape[2:])
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        y = torch.bmm(flat, up.mT) if bias is None else torch.baddbmm(bias[:, None], flat, up.mT)
        return y.view(*x.shape[:-1], -1)
