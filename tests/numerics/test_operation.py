"""Operations are the layers that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_diffusion.numerics.operation import ConvOperation, LinearOperation

X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear(bias):
    layer, x = nn.Linear(8, 5, bias=bias), X
    op = LinearOperation()
    assert torch.equal(op(x, layer.weight, layer.bias), layer(x))
    assert torch.equal(op.pointwise(x, layer.weight, layer.bias), layer(x))
    torch.testing.assert_close(
        op.broadcast(layer.weight[:, 0]) * layer(x), layer(x) @ layer.weight[:, 0].diag()
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (1, 1)},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    ],
)
def test_a_convolution(options, bias):
    layer = nn.Conv2d(6, 5, bias=bias, **options)
    op = ConvOperation(layer.stride, layer.padding, layer.dilation)
    assert torch.equal(op(X, layer.weight, layer.bias), layer(X))
    up = nn.Conv2d(5, 7, 1)
    assert torch.equal(op.pointwise(layer(X), up.weight, up.bias), up(layer(X)))
    scaled = op.broadcast(torch.arange(5.0)) * layer(X)
    torch.testing.assert_close(scaled, torch.einsum("nohw,o->nohw", layer(X), torch.arange(5.0)))
