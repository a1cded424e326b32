"""The factored norm and its checksum, against the dense norm in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dora_diffusion.numerics.dora import squared_norm
from dora_diffusion.numerics.norms import (
    checksum,
    factored_norm,
    norm_terms,
    parts_of,
)

AXES = ("output", "input")


def dense_norm(weight: torch.Tensor, axis: str) -> torch.Tensor:
    """The norm as a plain sum, kept broadcastable."""
    keep = 0 if axis == "output" else 1
    dims = [d for d in range(weight.ndim) if d != keep]
    return weight.pow(2).sum(dims, keepdim=True).sqrt()


def make(shape, rank=3, seed=0):
    """A weight and its factors, float64."""
    g = torch.Generator().manual_seed(seed)
    ones = [1] * (len(shape) - 2)
    sizes = (shape, (rank, *shape[1:]), (shape[0], rank, *ones))
    return [torch.randn(size, generator=g, dtype=torch.float64) for size in sizes]


@example(out=17, fan_in=1, rank=5, kernel=None, axis="output", seed=2, transposed=False)
@given(
    out=st.integers(1, 20),
    fan_in=st.integers(1, 20),
    rank=st.integers(1, 6),
    kernel=st.sampled_from([None, 1, 3]),
    axis=st.sampled_from(AXES),
    seed=st.integers(0, 1000),
    transposed=st.booleans(),
)
def test_factored_norm_equals_the_dense_norm(out, fan_in, rank, kernel, axis, seed, transposed):
    shape = (out, fan_in) if kernel is None else (out, fan_in, kernel, kernel)
    weight, down, up = make(shape, rank, seed)
    delta = 0.8 * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    expected = dense_norm(weight + delta, axis).flatten()
    weight = weight.float()
    if kernel is None and transposed:
        weight = weight.t().contiguous().t()
    actual = factored_norm(weight, down.float(), up.float(), 0.8, axis)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("axis", AXES)
def test_a_cancelling_channel_falls_back_to_the_dense_norm(axis):
    weight, down, up = make((6, 40), rank=6)
    # Choose B so that W + BA nearly vanishes: the factored norm would be rounding error.
    weight = -(up @ down) * (1 + 1e-4) if axis == "output" else -(up @ down) * (1 - 1e-4)
    weight, down, up = weight.float(), down.float(), up.float()
    exact = dense_norm(weight.double() + up.double() @ down.double(), axis).flatten()
    actual = factored_norm(weight, down, up, 1.0, axis)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("shape", [(6, 5), (320, 768), (6, 5, 3, 3), (640, 320, 3, 3)])
def test_a_checksum_tells_a_weight_from_one_with_a_changed_channel(axis, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    down = torch.randn(2, *shape[1:])
    up = torch.randn(shape[0], 2, *[1] * (len(shape) - 2))
    known = checksum(weight, axis)
    factors = down.flatten(1)[None], up.flatten(1)[None]
    terms = norm_terms([weight], *factors, 0.5, axis, [factors[axis == "input"]])
    change, same = terms.change[0], terms.checksum[0]
    dims = [dim for dim in range(weight.ndim) if dim != (0 if axis == "output" else 1)]
    adapted = weight.double() + 0.5 * (up.double().flatten(1) @ down.double().flatten(1)).view(
        shape
    )
    expected = adapted.square().sum(dims) - weight.double().square().sum(dims)
    torch.testing.assert_close(change.double(), expected, rtol=1e-4, atol=1e-3)
    norm = squared_norm(weight, axis)
    assert ((same - known).square() <= 1e-11 * norm).all()
    for channel in (0, 3, -1):
        other = weight.clone()
        other[channel] *= 1.01
        differs = (checksum(other, axis) - known).square() > 1e-10 * norm
        assert differs.any()
        if axis == "output":
            assert differs.nonzero().flatten().tolist() == [channel % shape[0]]


def test_three_parts_in_bfloat16_hold_a_factor_to_its_last_bit():
    g = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.arange(-20, 20)[:, None]
    factor = torch.randn(40, 64, generator=g) * scales
    parts = parts_of(factor)
    assert [part.dtype for part in parts] == [torch.bfloat16] * 3
    assert torch.equal(sum(part.double() for part in parts), factor.double())


def test_a_fake_forward_leaves_no_fake_tensor_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    length = 4099  # No other test has asked for it.
    with FakeTensorMode():
        checksum(torch.empty(3, length), "output")
    found = checksum(torch.ones(3, length), "output")
    assert type(found) is torch.Tensor
    assert torch.isfinite(found).all()
