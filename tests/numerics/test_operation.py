"""Operations are the layers that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_diffusion.numerics.fused import Scale
from dora_diffusion.numerics.operation import (
    ConvOperation,
    EmbeddingOperation,
    OneHot,
    Operation,
    RowOperation,
    dropout,
)

X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear(bias):
    layer, x = nn.Linear(8, 5, bias=bias), X
    op = Operation()
    assert torch.equal(op.apply(x, layer.weight, layer.bias), layer(x))
    assert torch.equal(op.up_project(x, layer.weight, layer.bias), layer(x))
    torch.testing.assert_close(
        layer.weight[:, 0].view(op.shape) * layer(x), layer(x) @ layer.weight[:, 0].diag()
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
    assert torch.equal(op.apply(X, layer.weight, layer.bias), layer(X))
    up = nn.Conv2d(5, 7, 1)
    assert torch.equal(op.up_project(layer(X), up.weight, up.bias), up(layer(X)))
    scaled = torch.arange(5.0).view(op.shape) * layer(X)
    torch.testing.assert_close(scaled, torch.einsum("nohw,o->nohw", layer(X), torch.arange(5.0)))


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_low_rank_convolution_is_one_with_the_product(dims, groups):
    """`B A` in the weight's shape, whatever the groups."""
    kind, x = (nn.Conv1d, X[..., 0]) if dims == 1 else (nn.Conv2d, X)
    layer = kind(6, 12, 3, stride=2, padding=2, dilation=2, groups=groups, bias=False)
    op = ConvOperation(layer.stride, layer.padding, layer.dilation, groups)
    assert torch.equal(op.apply(x, layer.weight), layer(x))
    down, up = torch.randn(4, *layer.weight.shape[1:]), torch.randn(12, 4, *[1] * dims)
    product = (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
    low_rank = op.up_project(op.down_project(x, down), up)
    torch.testing.assert_close(low_rank, op.apply(x, product), rtol=1e-5, atol=1e-4)
    values = torch.rand(6 // groups)
    scaled = op.apply(op.scale_input(x, values), layer.weight)
    weight = layer.weight * values.view(1, -1, *[1] * dims)
    torch.testing.assert_close(scaled, op.apply(x, weight), rtol=1e-5, atol=1e-5)


def test_an_embedding_is_a_linear_of_one_hot_vectors():
    table, ids = torch.randn(7, 5), torch.tensor([[3, 0], [6, 3]])
    dense, x = torch.nn.functional.one_hot(ids, 7).float(), OneHot.of(ids, torch.float32)
    op = EmbeddingOperation()
    assert torch.equal(op.apply(x, table.t()), table[ids])
    down, up, values = torch.randn(2, 7), torch.randn(5, 2), torch.rand(7)
    torch.testing.assert_close(
        op.up_project(op.down_project(x, down), up), nn.functional.linear(dense @ down.t(), up)
    )
    scaled = op.scale_input(x, values)
    torch.testing.assert_close(op.apply(scaled, table.t()), (dense * values) @ table)
    torch.manual_seed(0)
    dropped = op.apply(dropout(x, 0.5, True), table.t())
    torch.manual_seed(0)
    kept = torch.nn.functional.dropout(torch.ones(2, 2), 0.5)
    torch.testing.assert_close(dropped, kept[..., None] * table[ids])
    assert dropout(x, 0.5, False) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_total", [False, True])
def test_a_scaled_sum_of_16_bits_reads_float32_and_rounds_once(dtype, has_total):
    """So do its gradients; that of the gain is a sum in float32, which 16 bits could not hold."""
    g = torch.Generator().manual_seed(0)
    value, total, grad = (torch.rand(2000, 9, generator=g).to(dtype) + 1 for _ in range(3))
    grad = grad * 200 if dtype == torch.float16 else grad
    gain = (1 + 0.1 * torch.rand(9, generator=g)).requires_grad_()
    added = total if has_total else None
    y = Scale.apply(Operation(), added, value.requires_grad_(), gain, None)
    exact = gain.double() * value.double() + (total.double() if has_total else 0)
    share = torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert ((y.double() - exact) / exact).abs().max() <= share
    y.backward(grad)
    wanted = grad.double() * gain.double()
    assert ((value.grad.double() - wanted) / wanted).abs().max() <= share
    sums = (grad.double() * y.double()).sum(0)
    torch.testing.assert_close(gain.grad.double(), sums, rtol=1e-2, atol=0)


@pytest.mark.parametrize("size", [(5, 4), (16, 17)], ids=["small maps", "large maps"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (1, 1)},
        {"kernel_size": (1, 1), "stride": (2, 1)},
        {"kernel_size": (1, 1), "padding": (0, 1)},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    ],
    ids=str,
)
def test_each_row_is_convolved_with_its_own_factor(options, size):
    """However large the maps are, and with the gradients of rows that are convolved alone."""
    generator, rows = torch.Generator().manual_seed(2), 3
    kernel, others = (
        options["kernel_size"],
        {k: v for k, v in options.items() if k != "kernel_size"},
    )
    x = torch.randn(rows, 6, *size, generator=generator, dtype=torch.float64, requires_grad=True)
    down = torch.randn(rows, 2, 6, *kernel, generator=generator, dtype=torch.float64)
    down.requires_grad_()
    found = RowOperation(ConvOperation(**others), x.ndim, rows).down_project(x, down)
    each = zip(x, down, strict=True)
    expected = torch.stack([nn.functional.conv2d(row, own, **others) for row, own in each])
    torch.testing.assert_close(found, expected)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = (torch.autograd.grad((y * weight).sum(), (x, down)) for y in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
