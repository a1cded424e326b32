"""A layer as one node of the graph, and the gradients of the product with a gain."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.numerics import dora, fused
from dora_diffusion.numerics.fused import scale_gradients
from dora_diffusion.numerics.operation import ConvOperation, Operation, RowOperation
from dora_diffusion.numerics.quantised import quantise
from tests.numerics.test_forward import FORMATS, computed, in_format, layer_of, operands


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_the_output_is_bitwise_that_of_separate_operations(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, operand = layer_of(kind, "norm scope", "output", dtype), operands(kind, dtype=dtype)
        y, *gradients = computed("norm scope", model, *operand)
        with monkeypatch.context() as patch:
            patch.setattr(dora, "fused_forward", dora.scaled_forward)
            apart, *gradients_apart = computed("norm scope", model, *operand)
            patch.setattr(fused, "mixes_batch_norm", lambda kind: False)
            without, *gradients_without = computed("norm scope", model, *operand)
        assert torch.equal(y, apart)
        assert torch.equal(y, without)
        for others in (gradients_apart, gradients_without):
            for ours, theirs in zip(gradients, others, strict=True):
                error = (ours.double() - theirs.double()).norm()
                assert error <= 3 * torch.finfo(dtype).eps * theirs.double().norm()


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_quantised_weights_are_dense_in_both_passes(kind: str, bits: str) -> None:
    model, operand = (
        layer_of(kind, "run", "output", torch.float32),
        operands(kind, dtype=torch.float32),
    )
    ((_, layer),) = adapted_layers(model)
    packed = quantise(layer.weight.detach(), bits)
    layer.weight = nn.Parameter(packed.dense(), requires_grad=False)
    wanted, *wanted_gradients = computed("run", model, *operand)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    y, *gradients = computed("run", model, *operand)
    assert torch.equal(y, wanted)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scope", [norm_scope, lambda model: nullcontext()])
def test_second_derivatives_are_refused(scope: Any) -> None:
    model, (x, _) = layer_of("Linear", "no scope", "output"), operands("Linear")
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
