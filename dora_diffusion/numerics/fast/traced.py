"""The adapted layer as `torch.compile` sees it: plain autograd, from what a plan made.

The compiler fuses, and decides itself what is kept and what is computed again; only the gradient of
the magnitude is written out. Plain autograd would take it from the product with the base weight and
keep that product beside the output, for each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dora_diffusion.numerics.fast.gain import Factors
from dora_diffusion.numerics.operation import Operation
from dora_diffusion.numerics.precision import wide
from dora_diffusion.numerics.weights import NormAxis


def traced_dora(
    op: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
    axis: NormAxis,
) -> Tensor:
    """What `numerics.fast.dora` computes, for a layer without channels of a small gain.

    Args:
        op: What the weight does: a Linear or a Conv2d.
        x: Input, ``(..., in)`` or ``(N, in, H, W)``; computed in its dtype.
        weight: Frozen base weight, ``(out, in, *k)``.
        bias: Frozen bias ``(out,)``; it is not scaled.
        factors: The adapter's, in the dtype of ``x``.
        axis: Norm axis.
    """
    low, dim = x.dtype, op.channel_dim
    weight, bias = weight.to(low), None if bias is None else bias.to(low)
    gain, sums = factors.gain, (factors.sums, factors.shift_sums)
    if axis == "input":
        scaled = _with_sums((x * gain).to(low), x, sums, dim)
        return op(scaled, weight, bias) + op.pointwise(op(scaled, factors.down), factors.up)
    # The base result has its bias in it, which is scaled with the rest and corrected here.
    low_rank = op.pointwise(op(x, factors.down), factors.up, factors.shift)
    y = (low_rank + gain * op(x, weight, bias)).to(low)
    return _with_sums(y, None, sums, dim)


def _with_sums(
    value: Tensor, factor: Tensor | None, sums: tuple[Tensor, Tensor | None], dim: int
) -> Tensor:
    """``value``; its gradient's sums reach `Factors`, the first times a factor or itself."""
    result: Tensor = _WithSums.apply(value, factor, dim, *sums)  # type: ignore[no-untyped-call]
    return result


class _WithSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        factor: Tensor | None,
        dim: int,
        sums: Tensor,
        shift_sums: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(value if factor is None else factor)
        ctx.shifts, ctx.dim = shift_sums is not None, dim
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        # In float32: under a loss scale, a product of float16 overflows long before its factors.
        wide_grad = wide(grad)
        dims = [d for d in range(grad.ndim) if d != ctx.dim % grad.ndim]
        sums = (wide_grad * wide(factor)).sum(dims)
        return grad, None, None, sums, wide_grad.sum(dims) if ctx.shifts else None
