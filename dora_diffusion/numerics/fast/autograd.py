"""DoRA as autograd functions that keep no more for the backward pass than LoRA does.

With the norm detached (paper, section 4.3), ``y = g * (W + sBA) x + b`` on the output axis and
``y = (W + sBA)(g * x) + b`` on the input axis, with ``g = m / norm``. Plain autograd would keep the
base result and the low-rank result of each layer. Here only ``x`` is saved (or a tensor that it is
recomputed from, `Source`), on the output axis ``y`` (which the next operation usually keeps
anyway), and the rank-wide ``A x``.

The base operation runs as it is, and its result is corrected, so that updates survive which would
be rounded away in the weight. With ``B = 0`` and ``g = 1`` every correction is zero: a fresh
adapter is an exact identity.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.numerics.fast.gain import Factors, Gain
from dora_diffusion.numerics.fast.operation import FastOperation, with_gradients
from dora_diffusion.numerics.fast.source import Source
from dora_diffusion.numerics.operation import Operation


def dora(
    op: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Gain,
    source: Source | None = None,
) -> Tensor:
    """The adapted layer, differentiable in ``x``, A, B and m.

    Args:
        op: What the weight does: a Linear or a Conv2d.
        x: Input, ``(..., in)`` or ``(N, in, H, W)``; computed in its dtype.
        weight: Frozen base weight, ``(out, in, *k)``.
        bias: Frozen bias ``(out,)``; it is not scaled.
        gain: The adapter's, as `make_gains` made it of this weight and bias.
        source: What to keep instead of ``x``.
    """
    factors, dtype = gain.factors(x.dtype), x.dtype
    function = _OutputAxis if gain.axis == "output" else _InputAxis
    if weight.dtype != dtype:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    down, up, _, _, sums, shift_sums = factors
    result: Tensor = function.apply(
        x, down, up, sums, shift_sums, weight, bias, gain, factors, with_gradients(op), source
    )
    return result


def _once_in_own_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run without autocast: these functions choose the precision of each product themselves.

    And only once: what torch's `once_differentiable` does for more than some operations take.
    """

    @wraps(method)
    def run(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("an adapted layer has no second derivative (create_graph=True)")
        # Entering the context costs as much as a small operation.
        if not torch.is_autocast_enabled(grad.device.type):
            return method(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return method(ctx, grad)

    return run


def _grown(tensor: Tensor, gain: Tensor, out: Tensor | None = None) -> Tensor:
    """``gain * tensor`` in the tensor's dtype, with a gain in float32.

    Both this and `_grow_onto` widen what they read, and round once, as they write. Given where to
    write, autocast lets them be: it would copy their operands.
    """
    return torch.mul(tensor, gain, out=torch.empty_like(tensor) if out is None else out)


def _grow_onto(total: Tensor, base: Tensor, gain: Tensor) -> Tensor:
    """``total + gain * base`` in place of ``total``."""
    return torch.addcmul(total, base, gain, out=total)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left * right`` of two activations, in float32 where they are float16.

    Under a loss scale, their product passes float16's largest number long before either does.
    """
    if left.dtype != torch.float16:
        return left * right
    # One operation, which widens what it reads, without copies of its own on CUDA.
    return torch.addcmul(left.new_zeros(1, dtype=torch.float32), left, right)


class _Layer(torch.autograd.Function):
    """What both axes have in common."""

    @staticmethod
    def keep(ctx: Any, x: Tensor, *others: Tensor | None) -> None:
        """Save what the backward pass gets ``x`` from, and the rest."""
        source, ctx.recomputation = ctx.source, None
        kept = x
        if source is not None:
            ctx.recomputation, kept = source.recomputation, source.tensor
            ctx.recomputation.add_user()
        ctx.dtype, ctx.source = x.dtype, None
        ctx.save_for_backward(kept, *others)

    @staticmethod
    def input(ctx: Any, kept: Tensor) -> Tensor:
        """``x``, from what was kept."""
        if ctx.recomputation is None:
            return kept
        made: Tensor = ctx.recomputation.run(kept).to(ctx.dtype)
        return made


class _OutputAxis(_Layer):
    """``y = g * (W + sBA) x + b`` with g per output channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, sums: Tensor,
        shift_sums: Tensor | None, weight: Tensor, bias: Tensor | None, gain: Gain,
        factors: Factors, op: FastOperation, source: Source | None,
    ) -> Tensor:  # fmt: skip
        ctx.gain, ctx.factors, ctx.op, ctx.source = gain, factors, op, source
        hidden = op.apply(x, down)
        # The base result has its bias in it, which is scaled with the rest and corrected here.
        low_rank = op.pointwise(hidden, up, factors.shift)
        y = _grow_onto(low_rank, op(x, weight, bias), factors.gain)
        # y and not the base result: what comes next mostly keeps y for its own gradient anyway.
        kept = None if gain.small is not None and len(gain.small) == len(weight) else y
        _Layer.keep(ctx, x, kept, hidden, weight)
        return y

    @staticmethod
    @_once_in_own_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, y, hidden, weight = ctx.saved_tensors
        op, factors = ctx.op, ctx.factors
        x = _Layer.input(ctx, kept)
        shape, grad, x, hidden = x.shape, op.flat(grad), op.flat(x), op.flat(hidden)
        # Through the rank: the gradient of the full weight is never computed.
        grad_hidden, grad_up = op.up.gradients(grad, hidden, factors.up)
        product = None if y is None else _product(grad, op.flat(y))
        sums, shift_sums = _sums(ctx, grad, x, product, weight)
        grad_x = None
        if ctx.needs_input_grad[0]:
            # The product was summed already: its memory is free to take the scaled gradient.
            memory = product if product is not None and product.dtype == grad.dtype else None
            grown = _grown(grad, factors.gain, out=memory)
            grad_x = op.input_gradient(grown, weight, x)
        grad_down = op.weight_gradient(grad_hidden, x, factors.down, grad_x)
        grad_x = None if grad_x is None else grad_x.view(shape)
        return grad_x, grad_down, grad_up, sums, shift_sums, *[None] * 6


def _sums(
    ctx: Any, grad: Tensor, x: Tensor, product: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `Factors.sums` and of its `shift_sums`."""
    op, small, like = ctx.op, ctx.gain.small, ctx.factors.sums
    sums = torch.empty_like(like) if product is None else op.channel_sum(product, like.dtype)
    shift_sums = None if ctx.factors.shift is None else op.channel_sum(grad, like.dtype)
    if small is not None:
        layer = ctx.gain.direction()
        base, up = weight[small], (layer.scale * layer.up[small]).flatten(1).to(x.dtype)
        rows = torch.addmm(base.flatten(1), up, layer.down.flatten(1).to(x.dtype)).view_as(base)
        sums[small] = op.channel_sum(_product(op.select(grad, small), op(x, rows)), like.dtype)
        if shift_sums is not None:
            shift_sums[small] = 0
    return sums, shift_sums


class _InputAxis(_Layer):
    """``y = (W + sBA)(g * x) + b`` with g per input channel: a LoRA on the scaled input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, sums: Tensor,
        shift_sums: Tensor | None, weight: Tensor, bias: Tensor | None, gain: Gain,
        factors: Factors, op: FastOperation, source: Source | None,
    ) -> Tensor:  # fmt: skip
        ctx.gain, ctx.factors, ctx.op, ctx.source = gain, factors, op, source
        scaled = _grown(x, factors.gain)
        hidden = op.apply(scaled, down)
        y = op(scaled, weight, bias).add_(op.pointwise(hidden, up))
        _Layer.keep(ctx, x, hidden, weight)
        return y

    @staticmethod
    @_once_in_own_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, hidden, weight = ctx.saved_tensors
        op, factors = ctx.op, ctx.factors
        x = _Layer.input(ctx, kept)
        shape, grad, x, hidden = x.shape, op.flat(grad), op.flat(x), op.flat(hidden)
        # Scaled once more rather than kept: others keep x anyway, but nobody else keeps g * x.
        scaled = _grown(x, factors.gain)
        grad_hidden, grad_up = op.up.gradients(grad, hidden, factors.up)
        grad_x = op.input_gradient(grad, weight, x)
        grad_down = op.weight_gradient(grad_hidden, scaled, factors.down, grad_x)
        sums = op.channel_sum(_product(grad_x, x), factors.sums.dtype)
        needed = ctx.needs_input_grad[0]
        grad_x = _grown(grad_x, factors.gain).view(shape) if needed else None
        return grad_x, grad_down, grad_up, sums, *[None] * 7
