"""A convolution's gradients where the library's own are wrong."""

from __future__ import annotations

import pytest
import torch

from dora_diffusion.numerics.fast.operation import FastConv2d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (8, 1), (2, 3), (4, 4)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 1), (5, 2), (7, 4)])
def test_weight_gradient_of_a_map_smaller_than_the_kernel(size, kernel, stride, dtype):
    torch.manual_seed(0)
    padding = kernel // 2
    op = FastConv2d(stride=(stride, stride), padding=(padding, padding))
    for channels, rank in ((32, 4), (128, 4), (16, 2)):
        x = torch.randn(1, channels, *size, dtype=dtype)
        weight = torch.randn(rank, channels, kernel, kernel, dtype=dtype)
        grad = torch.randn_like(op(x, weight))
        exact = weight.double().requires_grad_()
        (op(x.double(), exact) * grad).sum().backward()
        for _ in range(20):
            # What lies in the memory that is taken next must not be found in the gradient.
            del [torch.full((weight.numel(),), torch.nan, dtype=torch.float32)][:]
            found = op.weight_gradient(grad, x, weight)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), exact.grad, rtol=0.02, atol=0.02)
