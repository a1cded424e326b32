"""Fused gradients: of the product with a gain, and of a whole layer.

With the norm detached (DoRA, section 4.3), a layer with its norm on the output axis computes ``y =
g (W x + b) + g s B A x + (1 - g) b``. `FusedLinear` and `FusedConv` are this layer as one node of
the graph: fewer nodes take less of the processor's time than the products of the layer, one by one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.numerics.devices import mixes_batch_norm
from dora_diffusion.numerics.operation import ConvOperation, Operation, leaves_garbage

# Without the call in Python of torch's `OpOverload`.
_batch_norm_backward: Any = torch.ops.aten.native_batch_norm_backward.default._op
_convolution_backward: Any = torch.ops.aten.convolution_backward.default._op
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


def scale_gradients(
    op: Operation, grad: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None, to_value: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of ``y = g * value + total``: ``g * dy`` and ``sum(dy * (y - b))``.

    The second one is the gradient of m times ``g norm``, since ``(y - b) / g`` is the output of the
    direction. These are gradients of a batch normalization with mean b and variance 1, which
    computes both with one operation and sums in the gain's dtype. Where it does not apply
    (channels-last images, a gain for each row of sequences, other devices), they are computed one
    by one.

    Args:
        op: Operation of the layer.
        grad: Gradient dy of the output.
        y: Output.
        gain: g, ``(n,)`` or ``(N, n)``.
        bias: b, ``(n,)`` in the gain's dtype; None: 0.
        to_value: Whether ``g * dy`` is needed.
    """
    if gain.ndim == 2 and op.shape[1:] == (-1, 1, 1) and y.is_contiguous():
        # The channels of all images are those of one.
        grad, y, shape = (*(t.reshape(1, -1, *t.shape[2:]) for t in (grad, y)), grad.shape)
        mean = None if bias is None else bias.repeat(len(gain))
        of_value, of_gain = scale_gradients(_IMAGES, grad, y, gain.reshape(-1), mean, to_value)
        return None if of_value is None else of_value.view(shape), of_gain.view(gain.shape)
    is_last, is_image = op.shape == (-1,), grad.ndim == len(op.shape) + 1 and y.is_contiguous()
    if (
        mixes_batch_norm(grad.device.type)
        and not torch.compiler.is_compiling()
        and gain.ndim == 1
        and grad.numel()
        and (is_last or is_image)
    ):
        shape, channels = grad.shape, len(gain)
        if is_last:
            grad, y = grad.reshape(-1, channels), y.reshape(-1, channels)
        else:
            grad = grad.contiguous()  # As in `FusedLayer`.
        mean, variance = unit_statistics(channels, gain.dtype, gain.device)
        statistics = ((mean if bias is None else bias), variance) * 2
        of_value, of_gain, _ = _batch_norm_backward(
            grad, y, gain, *statistics, False, 0.0, _VALUE_AND_GAIN if to_value else _GAIN
        )
        return of_value.view(shape) if to_value else None, of_gain
    of_value, dims = scaled_gradient(op, grad, gain) if to_value else None, op.dims[grad.ndim]
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


def scaled_gradient(op: Operation, grad: Tensor, gain: Tensor) -> Tensor:
    """Return ``g * dy``, in the dtype of dy."""
    shaped = gain.view(op.shape)
    if torch.compiler.is_compiling():
        return (shaped * grad).to(grad.dtype)
    # The kernel upcasts its inputs and rounds once. Autocast ignores operations with `out`.
    return torch.mul(grad, shaped, out=torch.empty_like(grad))


def _sum(tensor: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.sum(tensor, dims, dtype=dtype) if dims else tensor.to(dtype)


class Gradients:
    """Gradients of a layer's factors, summed over the backward passes of a step.

    Attributes:
        down: Memory for the gradient of A.
        up: Memory for the gradient of ``g s B``.
        convolution: The same gradients of a convolution, which torch returns as new tensors.
        gain: Sum for the gradient of m, ``(out,)``; None: no backward pass has reached the layer.
    """

    __slots__ = ("convolution", "down", "gain", "up")

    def __init__(self, down: Tensor, up: Tensor) -> None:
        self.down, self.up = down, up
        self.clear()

    def clear(self) -> None:
        """Begin a step."""
        self.convolution: tuple[Tensor, ...] = ()
        self.gain: Tensor | None = None


class FusedLayer:
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

    __slots__ = ("_statistics", "bias", "factors", "gradients", "mean", "op", "shift", "weight")

    def __init__(
        self, op: Any, weight: Tensor, bias: Tensor | None, shift: Tensor | None,
        mean: Tensor | None, factors: tuple[Tensor, Tensor, Tensor],
        gradients: Gradients | None = None,
    ) -> None:  # fmt: skip
        self.op, self.weight, self.bias, self.shift, self.mean = op, weight, bias, shift, mean
        self.factors, self.gradients, gain = factors, gradients, factors[2]
        self._statistics: tuple[Tensor, ...] = ()
        if mixes_batch_norm(gain.device.type):
            zeros, ones = unit_statistics(len(gain), gain.dtype, gain.device)
            self._statistics = ((zeros if mean is None else mean), ones) * 2

    def scale_gradients(
        self, grad: Tensor, y: Tensor, gain: Tensor, to_value: bool
    ) -> tuple[Any, Tensor]:
        """`scale_gradients` of a Linear with two dimensions, or of images."""
        if not self._statistics or not y.is_contiguous() or not grad.numel():
            return scale_gradients(self.op, grad, y, gain, self.mean, to_value)
        # Torch mixes up the memory formats of a single image.
        grad = grad.contiguous() if grad.ndim == 4 else grad
        of_value, of_gain, _ = _batch_norm_backward(
            grad, y, gain, *self._statistics, False, 0.0, _VALUE_AND_GAIN if to_value else _GAIN
        )
        return of_value, of_gain


def is_fusible(op: Operation) -> bool:
    """Return whether `fused` computes an operation: a Linear, or a Conv2d without groups."""
    return type(op) is Operation or (
        type(op) is ConvOperation and op.groups == 1 and len(op.stride) == 2
    )


class FusedLinear(torch.autograd.Function):
    """A Linear layer: ``(..., in)`` -> ``(..., out)``.

    Called with a `FusedLayer`, an anchor, x, and the factors A, ``g s B`` and g, which get their
    gradients through the graph. A layer with `FusedLayer.gradients` is called without factors: it
    has them, adds their gradients there, and needs an anchor that requires a gradient.
    """

    @staticmethod
    def forward(ctx: Any, layer: FusedLayer, anchor: Any, x: Tensor, *factors: Tensor) -> Tensor:
        down, up, gain = factors if layer.gradients is None else layer.factors
        shape = x.shape
        # Torch rounds products differently where it cannot flatten the input.
        if is_flat := len(shape) != 2 and x.is_contiguous():
            x = x.view(-1, shape[-1])
        inner = F.linear(x, down)
        y = F.linear(inner, up, layer.shift)
        y.addcmul_(F.linear(x, layer.weight, layer.bias), gain)
        ctx.save_for_backward(x, inner, y)
        ctx.saved = layer, down, up, gain, shape
        return y.view(*shape[:-1], y.shape[1]) if is_flat else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_FIRST_DERIVATIVE)
        x, inner, y = ctx.saved_tensors
        layer, down, up, gain, shape = ctx.saved
        to_x = ctx.needs_input_grad[2]
        if len(shape) != 2:
            grad = grad.reshape(-1, y.shape[-1])
        if len(x.shape) != 2:
            x, inner, y = (saved.reshape(-1, saved.shape[-1]) for saved in (x, inner, y))
        of_value, of_gain = layer.scale_gradients(grad, y, gain, to_x)
        of_inner = torch.mm(grad, up)
        of_x = None
        if to_x:
            of_x = torch.mm(of_value, layer.weight).addmm_(of_inner, down).view(shape)
        gradients = layer.gradients
        if gradients is None:
            of_up, of_down = torch.mm(grad.t(), inner), torch.mm(of_inner.t(), x)
            return None, None, of_x, of_down, of_up, of_gain
        if gradients.gain is None:
            torch.mm(grad.t(), inner, out=gradients.up)
            torch.mm(of_inner.t(), x, out=gradients.down)
            gradients.gain = of_gain
        else:
            gradients.up.addmm_(grad.t(), inner)
            gradients.down.addmm_(of_inner.t(), x)
            gradients.gain += of_gain
        return None, None, of_x


class FusedConv(torch.autograd.Function):
    """A Conv2d layer without groups: ``(N, in, h, w)`` -> ``(N, out, h', w')``, or without N.

    Called as `FusedLinear`.
    """

    @staticmethod
    def forward(ctx: Any, layer: FusedLayer, anchor: Any, x: Tensor, *factors: Tensor) -> Tensor:
        down, up, gain = factors if layer.gradients is None else layer.factors
        op, is_single = layer.op, x.ndim == 3
        x, settings = x[None] if is_single else x, (op.stride, op.padding, op.dilation)
        is_wide = op.leaves_garbage and leaves_garbage(x, down, op.dilation)
        operands = (x.float(), down.float()) if is_wide else (x, down)
        inner = torch.conv2d(*operands, None, *settings)
        inner = inner.to(x.dtype) if is_wide else inner
        y = torch.conv2d(inner, up, layer.shift)
        base = torch.conv2d(x, layer.weight, layer.bias, *settings)
        y.addcmul_(base, gain.view(-1, 1, 1))
        ctx.save_for_backward(x, inner, y)
        ctx.saved = layer, down, up, gain, is_single, is_wide
        return y[0] if is_single else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_FIRST_DERIVATIVE)
        x, inner, y = ctx.saved_tensors
        layer, down, up, gain, is_single, is_wide = ctx.saved
        op, to_x = layer.op, ctx.needs_input_grad[2]
        grad = grad[None] if is_single else grad
        settings = op.stride, op.padding, op.dilation, False, (0, 0), 1
        of_value, of_gain = layer.scale_gradients(grad, y, gain, to_x)
        of_inner, of_up, _ = _convolution_backward(grad, inner, up, None, *_PIXEL)
        operands = of_inner, x, down
        if is_wide:
            operands = of_inner.float(), x.float(), down.float()
        of_x, of_down, _ = _convolution_backward(*operands, None, *settings, (to_x, True, False))
        if to_x:
            of_base, _, _ = _convolution_backward(
                of_value, x, layer.weight, None, *settings, (True, False, False)
            )
            of_x = of_base.add_(of_x)[0] if is_single else of_base.add_(of_x)
        gradients = layer.gradients
        if gradients is None:
            return None, None, of_x, of_down, of_up, of_gain
        if gradients.gain is None:
            gradients.convolution, gradients.gain = (of_down, of_up), of_gain
        else:
            down_sum, up_sum = gradients.convolution
            gradients.convolution = down_sum + of_down, up_sum + of_up
            gradients.gain += of_gain
        return None, None, of_x


def fused(op: Operation) -> Any:
    """Return the autograd function of a fusible operation."""
    return FusedLinear if type(op) is Operation else FusedConv


def apply_of(function: Any) -> Any:
    """Return ``function.apply`` without its wrapper for functorch."""
    return super(torch.autograd.Function, function).apply
