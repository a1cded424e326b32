"""Nodes of the graph with their gradients: the product with a gain, and a whole layer.

Both take the gradient of m from the output that they save (the derivative is in `numerics.dora`). A
layer as one node takes less of the processor's time than its products, one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_diffusion.numerics.devices import mixes_batch_norm
from dora_diffusion.numerics.operation import ConvOperation, Operation, leaves_garbage

# Without the call in Python of torch's `OpOverload`.
_batch_norm_backward: Any = torch.ops.aten.native_batch_norm_backward.default._op
_gradients: Any = torch.ops.aten.convolution_backward.default._op
_VALUE_AND_GAIN, _GAIN = (True, True, False), (False, True, False)
_PIXEL = (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, True, False)
_IMAGES = ConvOperation()
_FIRST_DERIVATIVE = (
    "layers with DoRA have no second derivative; leave out create_graph=True, or merge the adapter "
    "first (merge_adapters) if only inputs need gradients"
)


@lru_cache(maxsize=256)
def unit_statistics(length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean 0 and variance 1 of so many channels."""
    with torch.inference_mode(False):
        options: Any = {"dtype": dtype, "device": device}
        return torch.zeros(length, **options), torch.ones(length, **options)


def scaled_sum(op: Operation, value: Tensor, gain: Tensor, total: Tensor | None = None) -> Tensor:
    """Return ``g * value + total`` in the dtype of ``value``, rounded once."""
    shaped = gain.view(op.shape)
    if torch.compiler.is_compiling():
        scaled = shaped * value
        return (scaled if total is None else scaled + total).to(value.dtype)
    # The kernel upcasts its inputs. Autocast ignores operations with `out`.
    out = torch.empty_like(value)
    if total is None:
        return torch.mul(value, shaped, out=out)
    return torch.addcmul(total, value, shaped, out=out)


def scale_gradients(
    op: Operation, grad: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None, to_value: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of ``y = g * value + total``: ``g * dy`` and ``sum(dy * (y - b))``.

    The second one is the gradient of m times ``g norm``. These are gradients of a batch
    normalization with mean b and variance 1, which computes both with one operation and sums in the
    gain's dtype. Where it does not apply (channels-last images, a gain for each row of sequences,
    other devices), they are computed one by one.

    Args:
        op: Operation of the layer.
        grad: Gradient dy of the output.
        y: Output.
        gain: g, ``(n,)`` or ``(N, n)``.
        bias: b, ``(n,)`` in the gain's dtype; None: 0.
        to_value: Whether ``g * dy`` is needed.
    """
    shape, is_linear = grad.shape, op.shape == (-1,)
    if gain.ndim == 2 and op.shape[1:] == (-1, 1, 1) and y.is_contiguous():
        # The channels of all images are those of one.
        grad, y = (t.reshape(1, -1, *shape[2:]) for t in (grad, y))
        mean = None if bias is None else bias.repeat(len(gain))
        of_value, of_gain = scale_gradients(_IMAGES, grad, y, gain.reshape(-1), mean, to_value)
        return None if of_value is None else of_value.view(shape), of_gain.view(gain.shape)
    if (
        gain.ndim == 1
        and (is_linear or (len(shape) == len(op.shape) + 1 and y.is_contiguous()))
        and grad.numel()
        and mixes_batch_norm(grad.device.type)
        and not torch.compiler.is_compiling()
    ):
        if not is_linear:
            grad = grad.contiguous()  # Torch mixes up the memory formats of a single image.
        elif len(shape) != 2:
            grad, y = grad.reshape(-1, len(gain)), y.reshape(-1, len(gain))
        mean, variance = unit_statistics(len(gain), gain.dtype, gain.device)
        statistics = ((mean if bias is None else bias), variance) * 2
        of_value, of_gain, _ = _batch_norm_backward(
            grad, y, gain, *statistics, False, 0.0, _VALUE_AND_GAIN if to_value else _GAIN
        )
        return of_value.view(shape) if to_value and is_linear and len(
            shape
        ) != 2 else of_value, of_gain
    of_value, dims = scaled_sum(op, grad, gain) if to_value else None, op.dims[grad.ndim]
    # In float16 the product would overflow with a loss scale: `addcmul` upcasts its inputs.
    product = (
        grad * y
        if grad.dtype != torch.float16
        else torch.addcmul(grad.new_zeros(1, dtype=torch.float32), grad, y)
    )
    of_gain = _sum(product, dims, gain.dtype)
    if bias is not None:
        of_gain = of_gain.addcmul(_sum(grad, dims, gain.dtype), bias, value=-1)
    return of_value, of_gain


def _sum(tensor: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.sum(tensor, dims, dtype=dtype) if dims else tensor.to(dtype)


class Scale(torch.autograd.Function):
    """``y = g * value + total``, with the sums for the gradient of m (`scale_gradients`).

    On the input axis y is ``g x``, and total and bias are None. Saving y instead of ``value`` saves
    memory, as the next operation usually saves y, too.
    """

    @staticmethod
    def forward(ctx: Any, op: Any, total: Any, value: Tensor, gain: Tensor, bias: Any) -> Tensor:
        ctx.op, ctx.gain, ctx.bias = op, gain, bias
        y = scaled_sum(op, value, gain, total)
        ctx.save_for_backward(y if ctx.needs_input_grad[3] else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,), (_, to_total, to_value, to_gain, _) = ctx.saved_tensors, ctx.needs_input_grad
        of_value = of_gain = None
        if to_gain:
            of_value, of_gain = scale_gradients(ctx.op, grad, y, ctx.gain, ctx.bias, to_value)
        elif to_value:
            of_value = scaled_sum(ctx.op, grad, ctx.gain)
        return None, grad if to_total else None, of_value, of_gain, None


@dataclass(slots=True)
class Gradients:
    """Gradients of a layer's factors, summed over the backward passes of a step.

    Attributes:
        down: Memory for the gradient of A.
        up: Memory for the gradient of ``g s B``.
        convolution: The same gradients of a convolution, which torch returns as new tensors.
        gain: Sum for the gradient of m, ``(out,)``; None: no backward pass has reached the layer.
    """

    down: Tensor
    up: Tensor
    convolution: tuple[Tensor, ...] = ()
    gain: Tensor | None = None

    def clear(self) -> None:
        """Begin a step."""
        self.convolution, self.gain = (), None


class FusedLayer(NamedTuple):
    """Tensors of a layer that are the same in all calls.

    Attributes:
        op: Operation of the weight.
        weight: Base weight ``(out, in, *k)``.
        bias: Bias ``(out,)``, or None.
        shift: ``(1 - g) b``, or None.
        mean: b in the gain's dtype; None: 0.
        factors: A, ``g s B`` and g.
        gradients: Memory for the gradients of the factors; None: the graph has them.
    """

    op: Any
    weight: Tensor
    bias: Tensor | None
    shift: Tensor | None
    mean: Tensor | None
    factors: tuple[Tensor, ...]
    gradients: Gradients | None = None


class FusedNode(torch.autograd.Function):
    """A layer as one node: a Linear, or a Conv2d without groups.

    Called with a `FusedLayer`, an anchor, x, and the factors A, ``g s B`` and g, which get their
    gradients through the graph. A layer with `FusedLayer.gradients` is called without factors: it
    has them, adds their gradients there, and needs an anchor that requires a gradient.
    """

    @staticmethod
    def forward(ctx: Any, layer: FusedLayer, anchor: Any, x: Tensor, *factors: Tensor) -> Tensor:
        ctx.layer, ctx.factors, ctx.shape = layer, factors or layer.factors, x.shape
        (down, up, gain), op = ctx.factors, layer.op
        is_linear = len(op.shape) == 1
        ctx.is_wide = not is_linear and leaves_garbage(x, down, op.dilation)
        if not is_linear:
            x, gain = x if x.ndim == 4 else x[None], gain.view(op.shape)
        # Torch rounds products differently where it cannot flatten the input.
        elif x.ndim != 2 and x.is_contiguous():
            x = x.view(-1, x.shape[-1])
        operands = (x.float(), down.float()) if ctx.is_wide else (x, down)
        inner = op.down_project(*operands).to(x.dtype)
        y: Tensor = op.up_project(inner, up, layer.shift)
        y.addcmul_(op.apply(x, layer.weight, layer.bias), gain)
        ctx.save_for_backward(x, inner, y)
        shape = ctx.shape
        return (
            y if y.ndim == len(shape) else y.view(*shape[: len(shape) + 1 - y.ndim], *y.shape[1:])
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_FIRST_DERIVATIVE)
        saved, layer, gradients = ctx.saved_tensors, ctx.layer, ctx.layer.gradients
        is_linear, to_x = len(layer.op.shape) == 1, ctx.needs_input_grad[2]
        if is_linear and saved[2].ndim != 2:
            saved = [tensor.reshape(-1, tensor.shape[-1]) for tensor in saved]
        grad = grad if grad.ndim == saved[2].ndim else grad.reshape(saved[2].shape)
        scaled, of_gain = scale_gradients(
            layer.op, grad, saved[2], ctx.factors[2], layer.mean, to_x
        )
        backward = _linear_backward if is_linear else _convolution_backward
        of_x, of_down, of_up = backward(ctx, grad, scaled if to_x else None, *saved[:2])
        if to_x and of_x.ndim != len(ctx.shape):
            of_x = of_x.view(ctx.shape)
        if gradients is None:
            return None, None, of_x, of_down, of_up, of_gain
        if gradients.gain is None:
            gradients.gain = of_gain
        else:
            gradients.gain += of_gain
        return None, None, of_x


def _linear_backward(ctx: Any, grad: Tensor, scaled: Any, x: Tensor, inner: Tensor) -> Any:
    """Return the gradients of x, A and B from dy and ``g dy``, None for those with memory."""
    (down, up, _), gradients = ctx.factors, ctx.layer.gradients
    of_inner = torch.mm(grad, up)
    of_x = None if scaled is None else torch.mm(scaled, ctx.layer.weight).addmm_(of_inner, down)
    if gradients is None:
        return of_x, torch.mm(of_inner.t(), x), torch.mm(grad.t(), inner)
    beta = 0 if gradients.gain is None else 1
    gradients.up.addmm_(grad.t(), inner, beta=beta)
    gradients.down.addmm_(of_inner.t(), x, beta=beta)
    return of_x, None, None


def _convolution_backward(ctx: Any, grad: Tensor, scaled: Any, x: Tensor, inner: Tensor) -> Any:
    """`_linear_backward` of a convolution."""
    (down, up, _), op, gradients = ctx.factors, ctx.layer.op, ctx.layer.gradients
    settings, to_x = (op.stride, op.padding, op.dilation, False, (0, 0), 1), scaled is not None
    of_inner, of_up, _ = _gradients(grad, inner, up, None, *_PIXEL)
    operands = (of_inner, x, down)
    if ctx.is_wide:
        operands = (of_inner.float(), x.float(), down.float())
    of_x, of_down, _ = _gradients(*operands, None, *settings, (to_x, True, False))
    if to_x:
        weight = ctx.layer.weight
        of_base, _, _ = _gradients(scaled, x, weight, None, *settings, (True, False, False))
        of_x = of_base.add_(of_x)
    if gradients is not None:
        sums = gradients.convolution
        gradients.convolution = (sums[0] + of_down, sums[1] + of_up) if sums else (of_down, of_up)
    return of_x, of_down, of_up


# Without a wrapper for functorch.
fused: Any = super(torch.autograd.Function, FusedNode).apply
