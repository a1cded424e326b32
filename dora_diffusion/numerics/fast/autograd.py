"""DoRA as autograd functions that keep no more for the backward pass than LoRA does.

With the norm detached (paper, section 4.3), ``y = g * (W + sBA) x + b`` on the output axis and
``y = (W + sBA)(g * x) + b`` on the input axis, with ``g = m / norm``. Plain autograd would keep the
base result and the low-rank result of each layer. Here only ``x`` is saved (or a tensor that it is
recomputed from, `Source`), on the output axis ``y`` (which the next operation usually keeps
anyway), the rank-wide ``A x`` and vectors.

Two exact forms of the same product are used, and the cheaper one is chosen by shape alone:

* the *merged-weight path* builds ``W + sBA`` and runs one operation;
* the *low-rank path* runs the base operation and corrects its result.

Both start as an exact identity: with ``B = 0`` and ``g = 1`` every correction is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_diffusion.numerics.dora import NORM_FLOOR, per_channel
from dora_diffusion.numerics.fast.gain import Gain
from dora_diffusion.numerics.fast.operation import FastOperation, with_gradients
from dora_diffusion.numerics.fast.paths import uses_merged_weight
from dora_diffusion.numerics.fast.source import Source
from dora_diffusion.numerics.operation import Operation
from dora_diffusion.numerics.precision import is_wide, wide
from dora_diffusion.numerics.weights import LayerWeights


def dora(
    op: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer: LayerWeights,
    gain: Gain,
    *,
    keep_output: bool = True,
    source: Source | None = None,
) -> Tensor:
    """The adapted layer, differentiable in ``x``, A, B and m.

    Args:
        op: What the weight does: a Linear or a Conv2d.
        x: Input, ``(..., in)`` or ``(N, in, H, W)``; computed in its dtype.
        weight: Frozen base weight, ``(out, in, *k)``.
        bias: Frozen bias ``(out,)``; it is not scaled.
        layer: The adapter, with a magnitude, whose value is in ``gain`` already.
        gain: ``make_gain`` of these very parameters.
        keep_output: Keep ``y`` for the gradient of ``m``. False recomputes it, for a layer whose
            output the next module overwrites.
        source: What to keep instead of ``x``.
    """
    fast = with_gradients(op)
    inputs = x, weight, bias, layer.down, layer.up, layer.magnitude, gain, layer.scale, fast, source
    if layer.norm_axis == "output":
        result: Tensor = _OutputAxis.apply(*inputs, keep_output)
    else:
        result = _InputAxis.apply(*inputs)
    return result


def _in_own_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run without autocast: these functions choose the precision of each product themselves."""

    @wraps(method)
    def run(ctx: Any, tensor: Tensor, *args: Any) -> Any:
        # Entering the context costs as much as a small operation.
        if not torch.is_autocast_enabled(tensor.device.type):
            return method(ctx, tensor, *args)
        with torch.autocast(tensor.device.type, enabled=False):
            return method(ctx, tensor, *args)

    return run


def _merged_weight(
    weight: Tensor, down: Tensor, scaled_up: Tensor, gain: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``g * W + scaled_up @ A``, where ``scaled_up`` has the gain of the output axis in it."""
    base, left, right = (t.to(dtype).flatten(1) for t in (weight, scaled_up, down))
    if gain is None:
        return torch.addmm(base, left, right).view_as(weight)
    return torch.mul(base, gain.to(dtype)[:, None]).addmm_(left, right).view_as(weight)


def _grow(tensor: Tensor, less_one: Tensor, out: Tensor | None = None) -> Tensor:
    """``tensor * (1 + less_one)``; ``g - 1`` survives a dtype that would round g to 1."""
    return torch.addcmul(tensor, tensor, less_one.to(tensor.dtype), out=out)


def _grow_onto(total: Tensor, base: Tensor, gain: Tensor) -> Tensor:
    """``total + gain * base`` in place of ``total``, or of ``base`` in low precision.

    There the whole correction is summed before it meets the base, so that it is rounded once.
    """
    if is_wide(total.dtype):
        return total.addcmul_(base, gain.to(total.dtype))
    return base.add_(total.addcmul_(base, (gain - 1).to(total.dtype)))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left * right`` of two activations, in float32 where they are float16.

    Under a loss scale, their product passes float16's largest number long before either does.
    """
    if left.dtype != torch.float16:
        return left * right
    # One operation, which widens what it reads, without copies of its own on CUDA.
    return torch.addcmul(left.new_zeros(1, dtype=torch.float32), left, right)


def _kept(x: Tensor, source: Source | None) -> Tensor:
    """What the backward pass gets ``x`` from."""
    if source is None:
        return x
    source.recomputation.add_user()
    return source.tensor


def recompute_input(ctx: Any, kept: Tensor) -> Tensor:
    """``x``, from what was kept."""
    return kept if ctx.recomputation is None else ctx.recomputation.run(kept).to(ctx.dtype)


class _OutputAxis(torch.autograd.Function):
    """``y = g * (W + sBA) x + b`` with g per output channel."""

    @staticmethod
    @_in_own_precision
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        magnitude: Tensor,
        gain: Gain,
        scale: float,
        op: FastOperation,
        source: Source | None,
        keep_output: bool,
    ) -> Tensor:
        g, dtype = gain.gain, x.dtype
        positions = op.positions(x, weight)
        use_merged, hidden = uses_merged_weight(positions, weight, down.shape[0], dtype), None
        base_bias = None if bias is None else bias.to(dtype)
        scaled_up = _scaled_up(up, g * scale, dtype)
        if use_merged:
            y = op(x, _merged_weight(weight, down, scaled_up, g, dtype), base_bias)
        else:
            hidden = op.down_project(x, down.to(dtype))
            # The base result has its bias in it, which is scaled with the rest and corrected here.
            shift = None if bias is None else ((1 - g) * bias).to(dtype)
            low_rank = op.pointwise(hidden, scaled_up, shift)
            y = _grow_onto(low_rank, op(x, weight.to(dtype), base_bias), op.broadcast(g))
        # y and not the base result: what comes next mostly keeps y for its own gradient anyway.
        kept = y if keep_output else None
        ctx.save_for_backward(_kept(x, source), kept, hidden, weight, bias, down, up)
        ctx.gain, ctx.scale, ctx.op, ctx.use_merged = gain, scale, op, use_merged
        ctx.recomputation, ctx.dtype = None if source is None else source.recomputation, dtype
        return y

    @staticmethod
    @once_differentiable
    @_in_own_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, y, hidden, weight, bias, down, up = ctx.saved_tensors
        op, scale, g, dtype = ctx.op, ctx.scale, ctx.gain.gain, ctx.dtype
        x = recompute_input(ctx, kept)
        need_x, need_m = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        hidden = op.down_project(x, down.to(dtype)) if hidden is None else hidden
        scaled_up = _scaled_up(up, g * scale, dtype)
        # Through the rank on either path: the gradient of the full weight is never computed.
        grad_hidden = op.up.input_gradient(grad, scaled_up, hidden)
        grad_up = wide(op.up.weight_gradient(grad, hidden, up.to(dtype)))
        grad_up = grad_up * per_channel(g * scale, up.ndim, "output")
        product = None if y is None else _product(grad, y)
        grad_m = grad_x = None
        if need_m:
            grad_m = _output_magnitude_gradient(ctx, grad, x, product, weight, bias, down, up)
        if need_x and ctx.use_merged:
            # Rebuilt, not kept: from forward to backward it would be a second copy of the model.
            grad_x = op.input_gradient(grad, _merged_weight(weight, down, scaled_up, g, dtype), x)
        elif need_x:
            # The product was summed already: its memory is free to take the scaled gradient.
            memory = product if product is not None and product.dtype == grad.dtype else None
            grown = _grow(grad, op.broadcast(g - 1), out=memory)
            grad_x = op.input_gradient(grown, weight.to(dtype), x)
        # The merged weight has the low-rank part of dx in it; the base weight has not.
        through = None if ctx.use_merged else grad_x
        grad_down = op.down_project_gradients(grad_hidden, x, down.to(dtype), through)
        grads = grad_down.to(down.dtype), grad_up.to(up.dtype), grad_m
        return grad_x, None, None, *grads, None, None, None, None, None


def _output_magnitude_gradient(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    product: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
) -> Tensor:
    """``dm_i = sum dy_i * ((W + sBA) x)_i / norm_i``, float32 ``(out,)``.

    ``(W + sBA) x = (y - b) / g``, so ``dy * y`` is all that it takes where g can be divided by.
    """
    op, (norm, g, small) = ctx.op, ctx.gain
    channels = small
    if product is None:
        channels = torch.arange(weight.shape[0], device=weight.device)
        total = torch.zeros_like(norm)
    else:
        total = op.channel_sum(product)
        if bias is not None:
            total = total - bias * op.channel_sum(grad)
        # Where g is 0 the quotient is replaced below: such channels are among the small ones.
        total = total / torch.where(g == 0, torch.ones_like(g), g)
    if channels is not None:
        rows = _merged_weight(weight[channels], down, ctx.scale * up[channels], None, x.dtype)
        of_rows = _product(op.select(grad, channels), op(x, rows))
        total[channels] = op.channel_sum(of_rows).to(total.dtype)
    return total / norm.clamp_min(NORM_FLOOR)


class _InputAxis(torch.autograd.Function):
    """``y = (W + sBA)(g * x) + b`` with g per input channel: a LoRA on the scaled input."""

    @staticmethod
    @_in_own_precision
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        magnitude: Tensor,
        gain: Gain,
        scale: float,
        op: FastOperation,
        source: Source | None,
    ) -> Tensor:
        dtype, hidden = x.dtype, None
        use_merged = uses_merged_weight(op.positions(x, weight), weight, down.shape[0], dtype)
        scaled = _grow(x, op.broadcast(gain.gain - 1))
        base_bias = None if bias is None else bias.to(dtype)
        if use_merged:
            y = op(scaled, _merged_weight(weight, down, scale * up, None, dtype), base_bias)
        else:
            hidden = op.down_project(scaled, down.to(dtype))
            y = op(scaled, weight.to(dtype), base_bias)
            y += op.pointwise(hidden, (scale * up).to(dtype))
        ctx.save_for_backward(_kept(x, source), hidden, weight, down, up)
        ctx.gain, ctx.scale, ctx.op, ctx.use_merged = gain, scale, op, use_merged
        ctx.recomputation, ctx.dtype = None if source is None else source.recomputation, dtype
        return y

    @staticmethod
    @once_differentiable
    @_in_own_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, hidden, weight, down, up = ctx.saved_tensors
        op, scale, (norm, g, _), dtype = ctx.op, ctx.scale, ctx.gain, ctx.dtype
        x = recompute_input(ctx, kept)
        need_x, need_m = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        # Scaled once more rather than kept: others keep x anyway, but nobody else keeps g * x.
        scaled = _grow(x, op.broadcast(g - 1))
        hidden = op.down_project(scaled, down.to(dtype)) if hidden is None else hidden
        grad_hidden = op.up.input_gradient(grad, (scale * up).to(dtype), hidden)
        grad_up = scale * wide(op.up.weight_gradient(grad, hidden, up.to(dtype)))
        grad_scaled = grad_x = grad_m = None
        if need_x or need_m:
            whole = weight.to(dtype)
            if ctx.use_merged:
                whole = _merged_weight(weight, down, scale * up, None, dtype)
            grad_scaled = op.input_gradient(grad, whole, x)
        through = None if ctx.use_merged else grad_scaled
        grad_down = op.down_project_gradients(grad_hidden, scaled, down.to(dtype), through)
        if grad_scaled is not None:
            grad_m = op.channel_sum(_product(grad_scaled, x)) / norm.clamp_min(NORM_FLOOR)
            grad_x = _grow(grad_scaled, op.broadcast(g - 1))
        grads = grad_down.to(down.dtype), grad_up.to(up.dtype), grad_m if need_m else None
        return grad_x if need_x else None, None, None, *grads, None, None, None, None


def _scaled_up(up: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``diag(factor) B``, scaled before it is rounded to ``dtype``."""
    return (up * per_channel(factor, up.ndim, "output")).to(dtype)
