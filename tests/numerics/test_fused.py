"""A layer as one node of the graph: its output, and its gradients against those of W'."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.adapters.inject import inject_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.adapters.stack import AdapterStack
from dora_diffusion.config import AdapterConfig
from dora_diffusion.numerics import dora, fused
from dora_diffusion.numerics.fused import scale_gradients
from dora_diffusion.numerics.operation import ConvOperation, Operation, RowOperation
from dora_diffusion.numerics.quantised import quantise
from tests.emulation import OneDNN

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (6, 7)),
    "linear of one vector": (lambda: nn.Linear(7, 5), (7,)),
    "linear of a sequence": (lambda: nn.Linear(7, 5), (2, 6, 7)),
    "linear of images": (lambda: nn.Linear(7, 5, bias=False), (2, 3, 4, 7)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7)),
    "conv of one image": (lambda: nn.Conv2d(4, 6, 3, padding=1), (1, 4, 5, 7)),
    "conv without a batch": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 7)),
    "strided conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 6, 6)),
    "dilated conv": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), (2, 4, 6, 6)),
    "conv of one pixel": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 3)),
    "nothing": (lambda: nn.Linear(7, 5), (0, 7)),
}
FORMATS = ("contiguous", "gradient", "input", "input and gradient")
"""Names of tensors that are transposed; images are then in channels-last format."""


def layer_of(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """An adapted layer whose parameters have moved."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind][0]()).to(dtype)
    inject_adapters(model, AdapterConfig(targets=("*",), rank=2, conv_rank=3, alpha=5.0))
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def operands(kind: str, memory: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Any]:
    """An input, and a function that gives an output the gradient to propagate."""
    shape = LAYERS[kind][1]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = in_format(x, "input" in memory).to(dtype)

    def upstream(y: Tensor) -> Tensor:
        up = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return in_format(up, "gradient" in memory).to(dtype)

    return x.requires_grad_(), upstream


def in_format(tensor: Tensor, is_transposed: bool) -> Tensor:
    if not is_transposed or tensor.ndim == 1:
        return tensor
    if tensor.ndim == 4:
        # As a sequence of pixels that is viewed as an image.
        pixels = tensor.flatten(2).transpose(1, 2).contiguous()
        return pixels.transpose(1, 2).view(tensor.shape)
    return tensor.transpose(1, -1).contiguous().transpose(1, -1)


def by_the_formula(model: nn.Module, x: Tensor, upstream: Any) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of ``m (W + s B A) / norm``, the norm a constant, in float64."""
    ((_, layer),) = adapted_layers(model)
    adapter: Any = layer.adapters["default"]
    values = [p.detach().double().requires_grad_() for p in adapter.parameters()]
    down, up, magnitude = values
    weight = layer.weight.detach().double()
    delta = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    direction = weight + adapter.weights().scale * delta
    norm = direction.detach().flatten(1).norm(dim=1)
    adapted = (magnitude / norm).view(-1, *[1] * (weight.ndim - 1)) * direction
    x = x.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double()
    if isinstance(layer, nn.Conv2d):
        y = F.conv2d(x, adapted, bias, layer.stride, layer.padding, layer.dilation)
    else:
        y = F.linear(x, adapted, bias)
    gradients = torch.autograd.grad(y, [x, *values], upstream(y).double())
    return y.detach(), list(gradients)


def in_scope(model: nn.Module, x: Tensor, upstream: Any) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients in a norm scope."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with norm_scope(model):
        y = model(x)
        gradients = torch.autograd.grad(y, [x, *parameters], upstream(y))
    return y.detach(), list(gradients)


def in_stack(model: nn.Module, x: Tensor, upstream: Any) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients as a run computes them, in the second step."""
    ((_, layer),) = adapted_layers(model)
    adapter: Any = layer.adapters["default"]
    stack = AdapterStack([layer], [[adapter]])
    for _ in range(2):
        x.grad = None
        with stack.scope(), stack.of(0):
            y = model(x)
            y.backward(upstream(y))
    return y.detach(), [x.grad, *(p.grad for p in adapter.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("way", [in_scope, in_stack])
@pytest.mark.parametrize(("kind", "memory"), itertools.product(LAYERS, FORMATS))
def test_output_and_gradients_are_those_of_the_formula(way: Any, kind: str, memory: str) -> None:
    model, (x, upstream) = layer_of(kind), operands(kind, memory)
    wanted, wanted_gradients = by_the_formula(model, x, upstream)
    y, gradients = way(model, x, upstream)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-11)
    # m is float32.
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("way", [in_scope, in_stack])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear of a sequence", "conv", "conv of one image"])
def test_sums_are_exact_in_16_bits(way: Any, kind: str, dtype: torch.dtype) -> None:
    """The magnitude's sum has the error of its inputs; that of rounded products is larger."""
    model, (x, upstream) = layer_of(kind, dtype), operands(kind, "contiguous", dtype)
    wanted, wanted_gradients = by_the_formula(model, x, upstream)
    y, gradients = way(model, x, upstream)
    step = torch.finfo(dtype).eps
    assert (y.double() - wanted).norm() <= 2 * step * wanted.norm()
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        assert (ours.double() - theirs).norm() <= 3 * step * theirs.norm()


@pytest.mark.parametrize("kind", ["linear of a sequence", "conv"])
def test_the_output_is_bitwise_that_of_separate_operations(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, (x, upstream) = layer_of(kind, dtype), operands(kind, "contiguous", dtype)
        y, gradients = in_scope(model, x, upstream)
        with monkeypatch.context() as patch:
            patch.setattr(dora, "fused_forward", dora.scaled_forward)
            apart, gradients_apart = in_scope(model, x, upstream)
            patch.setattr(fused, "mixes_batch_norm", lambda kind: False)
            without, gradients_without = in_scope(model, x, upstream)
        assert torch.equal(y, apart)
        assert torch.equal(y, without)
        for others in (gradients_apart, gradients_without):
            for ours, theirs in zip(gradients, others, strict=True):
                error = (ours.double() - theirs.double()).norm()
                assert error <= 2 * torch.finfo(dtype).eps * theirs.double().norm()


@pytest.mark.parametrize("kind", ["linear of a sequence", "conv"])
@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_quantised_weights_are_dense_in_both_passes(kind: str, bits: str) -> None:
    model, (x, upstream) = (
        layer_of(kind, torch.float32),
        operands(kind, "contiguous", torch.float32),
    )
    ((_, layer),) = adapted_layers(model)
    packed = quantise(layer.weight.detach(), bits)
    layer.weight = nn.Parameter(packed.dense(), requires_grad=False)
    wanted, wanted_gradients = in_stack(model, x, upstream)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    y, gradients = in_stack(model, x, upstream)
    assert torch.equal(y, wanted)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-6, atol=1e-6)


def test_taps_outside_of_a_small_image_have_no_garbage_as_gradient() -> None:
    """OneDNN in bfloat16 does not write the gradients of taps that only meet padding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).bfloat16()
    inject_adapters(model, AdapterConfig(targets=("*",), rank=2, conv_rank=3))
    ((_, layer),) = adapted_layers(model)
    for way in (in_scope, in_stack):
        x = torch.ones(1, 4, 1, 1, dtype=torch.bfloat16, requires_grad=True)
        layer.adapters["default"].up.data.fill_(0.5)  # type: ignore[union-attr]
        with OneDNN():
            _, gradients = way(model, x, torch.ones_like)
        of_down = gradients[1].clone()
        of_down[:, :, 1, 1] = 0
        assert not of_down.any()


@pytest.mark.parametrize("scope", [norm_scope, lambda model: nullcontext()])
def test_second_derivatives_are_refused(scope: Any) -> None:
    model, (x, _) = layer_of("linear"), operands("linear", "contiguous")
    with scope(model):
        y = model(x)
        with pytest.raises(RuntimeError, match=r"no second derivative.*create_graph=True"):
            torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (3, 4, 5), (3, 2, 4, 5), (1, 5, 4, 2)], ids=str)
def test_gradients_of_a_gain_for_each_row(shape: tuple[int, ...], memory: str, bias: bool) -> None:
    """Images have their channels in the second dimension, sequences in the last."""
    torch.manual_seed(0)
    is_image = shape[1] == 5
    op = RowOperation(ConvOperation() if is_image else Operation(), len(shape), shape[0])
    grad, y = torch.randn(2, *shape, dtype=torch.float64)
    grad, y = in_format(grad, "gradient" in memory), in_format(y, "input" in memory)
    gain, mean = torch.rand(shape[0], 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    of_value, of_gain = scale_gradients(op, grad, y, gain, mean if bias else None, True)
    rest = (2, 3) if is_image else tuple(range(1, len(shape) - 1))
    shaped, along = (gain.view(op.shape), mean.view(-1, 1, 1) if is_image else mean)
    torch.testing.assert_close(of_value, shaped * grad)
    torch.testing.assert_close(of_gain, (grad * (y - (along if bias else 0))).sum(rest))
    assert scale_gradients(op, grad, y, gain, None, False)[0] is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_mixed", [True, False], ids=["batch norm", "one by one"])
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (Operation(), (3, 5)),
        (Operation(), (5,)),
        (Operation(), (2, 3, 5)),
        (ConvOperation(), (2, 5, 3, 4)),
        (ConvOperation(), (1, 5, 3, 4)),
        (ConvOperation(), (5, 3, 4)),
        (ConvOperation((1,), (0,), (1,)), (2, 5, 7)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else type(value).__name__,
)
def test_gradients_of_a_gain(
    op: Operation, shape: tuple[int, ...], is_mixed: bool, bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(fused, "mixes_batch_norm", lambda kind: is_mixed)
    torch.manual_seed(0)
    grad, y = torch.randn(2, *shape, dtype=torch.float64)
    gain, mean = torch.rand(2, 5, dtype=torch.float64)
    of_value, of_gain = scale_gradients(op, grad, y, gain, mean if bias else None, True)
    dims = [d for d in range(len(shape)) if d != len(shape) - len(op.shape)]
    shaped = op.shape
    centred = y - (mean.view(shaped) if bias else 0)
    wanted = (grad * centred).sum(dims) if dims else grad * centred
    torch.testing.assert_close(of_gain, wanted)
    torch.testing.assert_close(of_value, gain.view(shaped) * grad)
    assert scale_gradients(op, grad, y, gain, None, False)[0] is None
