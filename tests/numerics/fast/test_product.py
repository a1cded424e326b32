"""The product of matrices is the product, however its factors lie in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dora_diffusion.numerics.fast.operation import FastLinear
from dora_diffusion.numerics.fast.product import HAS_ONEDNN, matrix_product, suits_onednn


def strided(rows: int, columns: int, how: str) -> Tensor:
    if how == "transposed":
        return torch.randn(columns, rows).t()
    if how == "sliced":
        return torch.randn(2 * rows, columns + 3)[::2, 1 : columns + 1]
    if how == "expanded":
        return torch.randn(1, columns).expand(rows, -1)
    return torch.randn(rows, columns)


WAYS = ("plain", "transposed", "sliced", "expanded")


@pytest.mark.parametrize("right", WAYS)
@pytest.mark.parametrize("left", WAYS)
@pytest.mark.parametrize("shape", [(64, 40, 9), (3, 70, 130), (1, 5, 1), (17, 1, 23)])
def test_it_is_the_product(left: str, right: str, shape: tuple[int, int, int]) -> None:
    n, k, m = shape
    torch.manual_seed(0)
    a, b = strided(n, k, left), strided(k, m, right)
    assert suits_onednn(a, b) == HAS_ONEDNN
    expected = a.double() @ b.double()
    torch.testing.assert_close(matrix_product(a, b).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_torchs_own(dtype: torch.dtype) -> None:
    a, b = torch.randn(5, 7, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    assert torch.equal(matrix_product(a, b), a @ b)


def test_an_empty_product_is_empty_or_zero() -> None:
    assert matrix_product(torch.randn(0, 4), torch.randn(4, 3)).shape == (0, 3)
    assert torch.equal(matrix_product(torch.randn(2, 0), torch.randn(0, 3)), torch.zeros(2, 3))


def test_where_a_gradient_is_wanted_there_is_one() -> None:
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(6, 5)
    (gradient,) = torch.autograd.grad(matrix_product(a, b).sum(), a)
    torch.testing.assert_close(gradient, b.sum(dim=1).expand(4, -1))


@pytest.mark.skipif(not HAS_ONEDNN, reason="torch was built without oneDNN")
def test_autocast_does_not_lower_its_precision() -> None:
    a, b = torch.randn(64, 512), torch.randn(512, 64)
    with torch.no_grad():
        expected = matrix_product(a, b)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(matrix_product(a, b), expected)


@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0)])
def test_a_linear_has_an_answer_for_no_rows(leading: tuple[int, ...]) -> None:
    op, weight = FastLinear(), torch.randn(4, 6)
    x, grad = torch.randn(*leading, 6), torch.randn(*leading, 4)
    assert op.apply(x, weight[:2]).shape == (*leading, 2)
    x, grad = op.flat(x), op.flat(grad)
    assert x.shape == (0, 6)
    assert op.input_gradient(grad, weight, x).shape == x.shape
    assert torch.equal(op.weight_gradient(grad, x, weight), torch.zeros(4, 6))
