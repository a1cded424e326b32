"""Nodes of the graph with their gradients: the product with a gain, and a whole layer.

Both take the gradient of m from the output that they save (the derivative is in `numerics.dora`). A
layer as one node takes less of the processor's time than its products, one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.numerics.devices import mixes_batch_norm
from dora_diffusion.numerics.operation import ConvOperation, Operation, leaves_garbage

# Without the call in Python of torch's `OpOverload`.
_batch_norm: Any = torch.ops.aten.native_batch_norm_backward.default._op
_convolution: Any = torch.ops.aten.convolution_backward.default._op
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


def statistics_of(gain: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Return b and variance 1 as torch takes them, twice; nothing on other kinds of devices."""
    if not mixes_batch_norm(gain.device.type):
        return ()
    zeros, ones = unit_statistics(len(gain), gain.dtype, gain.device)
    return ((zeros if bias is None else bias), ones) * 2


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
        and grad.numel()
        and (is_linear or (grad.ndim == len(op.shape) + 1 and y.is_contiguous()))
        and not torch.compiler.is_compiling()
        and (statistics := statistics_of(gain, bias))
    ):
        if is_linear:
            grad, y = grad.reshape(-1, shape[-1]), y.reshape(-1, shape[-1])
        else:
            grad = grad.contiguous()  # As in `FusedNode`.
        mask = _VALUE_AND_GAIN if to_value else _GAIN
        of_value, of_gain, _ = _batch_norm(grad, y, gain, *statistics, False, 0.0, mask)
        return of_value.view(shape) if to_value else None, of_gain
    of_value = scaled_sum(op, grad, gain) if to_value else None
    sizes = [*[1] * (len(shape) - len(op.shape)), *op.shape]
    dims = [dim for dim in range(gain.ndim - 1, len(shape)) if sizes[dim] == 1]
    if grad.dtype == torch.float16:  # With a loss scale the product would overflow.
        product = torch.addcmul(grad.new_zeros(1, dtype=torch.float32), grad, y)
    else:
        product = grad * y
    of_gain = _sum(product, dims, gain.dtype)
    if bias is not None:
        of_gain = of_gain.addcmul(_sum(grad, dims, gain.dtype), bias, value=-1)
    return of_value, of_gain


def _sum(tensor: Tensor, dims: list[int], dtype: torch.dtype) -> Tensor:
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

    def add(self, down: Any, up: Any, gain: Tensor) -> None:
        """Add the gradients of a backward pass, without the products of a Linear."""
        convolution: tuple[Tensor, ...] = () if down is None else (down, up)
        if self.gain is not None:
            gain = self.gain.add_(gain)
            convolution = tuple(map(torch.add, self.convolution, convolution))
        self.gain, self.convolution = gain, convolution

    def clear(self) -> None:
        """Begin a step."""
        self.convolution, self.gain = (), None


@dataclass(slots=True)
class FusedLayer:
    """Tensors of a layer that are the same in all calls.

    Attributes:
        op: Operation of the weight.
        weight: Base weight ``(out, in, *k)``.
        bias: Bias ``(out,)``, or None.
        factors: `numerics.dora.Factors`.
        gradients: Memory for the gradients of A, ``g s B`` and g; None: the graph has them.
        statistics: Statistics of the batch normalization of `scale_gradients`; empty: it has none.
    """

    op: Any
    weight: Tensor
    bias: Tensor | None
    factors: Any
    gradients: Gradients | None = None
    statistics: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.statistics = statistics_of(self.factors.gain, self.factors.mean)


class FusedNode(torch.autograd.Function):
    """A layer as one node: a Linear, or a Conv2d without groups.

    Called with a `FusedLayer`, an anchor, x, and the factors A, ``g s B`` and g, which get their
    gradients through the graph. A layer with `FusedLayer.gradients` is called without factors: it
    has them, adds their gradients there, and needs an anchor that requires a gradient.
    """

    @staticmethod
    def forward(ctx: Any, layer: FusedLayer, anchor: Any, x: Tensor, *factors: Tensor) -> Tensor:
        op, shape, is_wide = layer.op, x.shape, False
        down, up, gain = factors = factors or layer.factors[:3]
        ndim, shift = len(shape), layer.factors.shift
        if down.ndim == 2:
            # Torch rounds products differently where it cannot flatten the input.
            if ndim != 2 and x.is_contiguous():
                x = x.view(-1, shape[-1])
            inner = F.linear(x, down)
            y = F.linear(inner, up, shift)
            y.addcmul_(F.linear(x, layer.weight, layer.bias), gain)
        else:
            x, settings = x[None] if ndim == 3 else x, (op.stride, op.padding, op.dilation)
            is_wide = leaves_garbage(x, down, op.dilation)
            operands = (x.float(), down.float()) if is_wide else (x, down)
            inner = torch.conv2d(*operands, None, *settings)
            inner = inner.to(x.dtype) if is_wide else inner
            y = torch.conv2d(inner, up, shift)
            base = torch.conv2d(x, layer.weight, layer.bias, *settings)
            y.addcmul_(base, gain.view(-1, 1, 1))
        ctx.save_for_backward(x, inner, y)
        ctx.saved = layer, factors, shape, is_wide
        if y.ndim != ndim:
            y = y[0] if y.ndim == 4 else y.view(*shape[:-1], y.shape[1])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_FIRST_DERIVATIVE)
        (x, inner, y), to_x = ctx.saved_tensors, ctx.needs_input_grad[2]
        layer, (down, up, gain), shape, is_wide = ctx.saved
        gradients, ndim = layer.gradients, down.ndim
        if y.ndim != ndim:
            x, inner, y = (saved.reshape(-1, saved.shape[-1]) for saved in (x, inner, y))
        if len(shape) != ndim:
            grad = grad.reshape(*y.shape)
        if layer.statistics and y.is_contiguous() and grad.numel():
            # Torch mixes up the memory formats of a single image.
            grad = grad.contiguous() if ndim == 4 else grad
            mask = _VALUE_AND_GAIN if to_x else _GAIN
            scaled, of_gain, _ = _batch_norm(grad, y, gain, *layer.statistics, False, 0.0, mask)
        else:
            scaled, of_gain = scale_gradients(layer.op, grad, y, gain, layer.factors.mean, to_x)
        of_x = of_down = of_up = None
        if ndim == 2:
            of_inner = torch.mm(grad, up)
            if to_x:
                of_x = torch.mm(scaled, layer.weight).addmm_(of_inner, down)
            if gradients is None:
                of_up, of_down = torch.mm(grad.t(), inner), torch.mm(of_inner.t(), x)
            elif gradients.gain is None:
                torch.mm(grad.t(), inner, out=gradients.up)
                torch.mm(of_inner.t(), x, out=gradients.down)
            else:
                gradients.up.addmm_(grad.t(), inner)
                gradients.down.addmm_(of_inner.t(), x)
        else:
            op = layer.op
            settings = op.stride, op.padding, op.dilation, False, (0, 0), 1
            of_inner, of_up, _ = _convolution(grad, inner, up, None, *_PIXEL)
            low = (of_inner.float(), x.float(), down.float()) if is_wide else (of_inner, x, down)
            of_x, of_down, _ = _convolution(*low, None, *settings, (to_x, True, False))
            if to_x:
                full = scaled, x, layer.weight, None, *settings, (True, False, False)
                of_x = _convolution(*full)[0].add_(of_x)
        if of_x is not None and of_x.ndim != len(shape):
            of_x = of_x.view(*shape)  # Reading a `torch.Size` takes twice as long.
        if gradients is None:
            return None, None, of_x, of_down, of_up, of_gain
        gradients.add(of_down, of_up, of_gain)
        return None, None, of_x


# Without a wrapper for functorch.
fused: Any = super(torch.autograd.Function, FusedNode).apply
