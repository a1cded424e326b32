"""The autograd functions' outputs and gradients against a dense float64 autograd reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.fast.autograd import dora
from dora_diffusion.numerics.fast.gain import PlanInputs, WeightStatistics
from dora_diffusion.numerics.fast.plan import make_gains
from dora_diffusion.numerics.operation import ConvOperation, LinearOperation
from dora_diffusion.numerics.weights import LayerWeights

AXES = ("output", "input")
# kind -> (weight shape, input shape, operation, the same operation in plain torch)
CASES = {
    "linear": ((12, 7), (5, 9, 7), LinearOperation(), F.linear),
    "linear square": ((8, 8), (3, 8), LinearOperation(), F.linear),
    "conv 3x3": (
        (6, 5, 3, 3),
        (2, 5, 9, 8),
        ConvOperation(padding=(1, 1)),
        lambda x, w, b=None: F.conv2d(x, w, b, padding=1),
    ),
    "conv 1x1": ((6, 10, 1, 1), (2, 10, 4, 5), ConvOperation(), F.conv2d),
    "conv strided": (
        (8, 4, 3, 3),
        (2, 4, 9, 7),
        ConvOperation(stride=(2, 2), padding=(1, 1)),
        lambda x, w, b=None: F.conv2d(x, w, b, stride=2, padding=1),
    ),
    "conv dilated": (
        (4, 6, 3, 3),
        (1, 6, 10, 10),
        ConvOperation(padding=(2, 2), dilation=(2, 2)),
        lambda x, w, b=None: F.conv2d(x, w, b, padding=2, dilation=2),
    ),
}


def dense_norm(weight: torch.Tensor, axis: str) -> torch.Tensor:
    """The norm as a plain sum, kept broadcastable."""
    keep = 0 if axis == "output" else 1
    dims = [d for d in range(weight.ndim) if d != keep]
    return weight.pow(2).sum(dims, keepdim=True).sqrt()


def reference_weight(weight, down, up, magnitude, scale, axis, detach=True):
    """``W'`` from the definition, dense, in the tensors' own dtype."""
    delta = (up.flatten(1) @ down.flatten(1)).view_as(weight)
    direction = weight + scale * delta
    norm = dense_norm(direction, axis)
    return magnitude.view_as(norm) * direction / (norm.detach() if detach else norm)


def make(shape, rank=3, axis="output", dtype=torch.float64, seed=0, bias=True):
    """A layer whose magnitude has moved, with both factors away from zero."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    weight = draw(*shape)
    down, up = draw(rank, *shape[1:]), draw(shape[0], rank, *[1] * (len(shape) - 2))
    magnitude = weight_norm(weight, axis).to(dtype)
    magnitude = magnitude * (1 + 0.3 * draw(*magnitude.shape))
    return weight, draw(shape[0]) if bias else None, down, up, magnitude


def run_ours(op, axis, x, weight, bias, down, up, magnitude, scale, **kwargs):
    layer = LayerWeights(down, up, magnitude, scale * len(down), axis)
    statistics = WeightStatistics(weight, axis)
    inputs = PlanInputs(layer, magnitude, weight, bias, statistics, **kwargs)
    return dora(op, x, weight, bias, make_gains([inputs])[0])


def gradients(function, leaves, upstream):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, upstream.to(y.dtype))


def check(case, axis, dtype=torch.float64, tolerance=1e-10, rank=3, bias=True, **kwargs):
    shape, input_shape, op, plain = CASES[case]
    weight, b, down, up, magnitude = make(shape, rank, axis, bias=bias)
    scale = 1.7
    g = torch.Generator().manual_seed(1)
    x = torch.randn(input_shape, generator=g, dtype=torch.float64)
    upstream = torch.randn(plain(x, weight, b).shape, generator=g, dtype=torch.float64)
    expected = gradients(
        lambda x, d, u, m: plain(x, reference_weight(weight, d, u, m, scale, axis), b),
        (x, down, up, magnitude),
        upstream,
    )
    actual = gradients(
        lambda x, d, u, m: run_ours(
            op, axis, x, weight.to(dtype), None if b is None else b.to(dtype), d, u, m, scale,
            **kwargs,
        ),
        [t.to(dtype) for t in (x, down, up, magnitude)],
        upstream,
    )  # fmt: skip
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=tolerance, atol=tolerance * 10)
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        limit = tolerance * theirs.abs().max().item() * 10
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=limit)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_equal_the_dense_float64_reference(case, axis, bias):
    check(case, axis, bias=bias)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
def test_float32_agrees_with_float64(case, axis):
    check(case, axis, torch.float32, 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_recomputed_output_gives_the_same_gradients(case):
    check(case, "output", keep_output=False)


@pytest.mark.parametrize("axis", AXES)
def test_zero_and_tiny_magnitudes_have_exact_gradients(axis):
    weight, bias, down, up, magnitude = make((12, 7), axis=axis)
    magnitude[0], magnitude[1] = 0, 1e-9
    x = torch.randn(4, 7, dtype=torch.float64)
    upstream = torch.randn(4, 12, dtype=torch.float64)
    expected = gradients(
        lambda m: F.linear(x, reference_weight(weight, down, up, m, 0.5, axis), bias),
        [magnitude],
        upstream,
    )
    actual = gradients(
        lambda m: run_ours(LinearOperation(), axis, x, weight, bias, down, up, m, 0.5),
        [magnitude],
        upstream,
    )
    torch.testing.assert_close(actual[1][0], expected[1][0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keep_output", [True, False])
@pytest.mark.parametrize("shrink", [1.0, 1e-4])
def test_the_magnitude_gradient_of_float16_does_not_overflow(case, axis, keep_output, shrink):
    """Under a loss scale: each product with an output is beyond float16, and no gradient is."""
    shape, input_shape, op, plain = CASES[case]
    weight, bias, down, up, magnitude = make(shape, axis=axis)
    # A gain below SMALL_GAIN takes another path.
    magnitude[0] *= shrink
    g = torch.Generator().manual_seed(1)
    x = 30 * torch.randn(input_shape, generator=g, dtype=torch.float64)
    upstream = torch.randn(plain(x, weight, bias).shape, generator=g, dtype=torch.float64)
    upstream *= 2000
    half = [t.half() for t in (x, weight, bias, upstream)]
    x, weight, bias, upstream = (t.double() for t in half)
    down, up, magnitude = (t.float().double() for t in (down, up, magnitude))
    (expected,) = gradients(
        lambda m: plain(x, reference_weight(weight, down, up, m, 0.1, axis), bias),
        [magnitude],
        upstream,
    )[1]
    factors = [t.float() for t in (down, up, magnitude)]
    y, (_, found) = gradients(
        lambda x, m: run_ours(
            op, axis, x, half[1], half[2], *factors[:2], m, 0.1, keep_output=keep_output
        ),
        [half[0], factors[2]],
        half[3],
    )
    assert (y.float().abs().max() * half[3].float().abs().max()).item() > 65504
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), expected, rtol=0.02, atol=5e-3 * expected.abs().max().item()
    )


@pytest.mark.parametrize("axis", AXES)
def test_input_without_gradient_is_skipped(axis):
    weight, bias, down, up, magnitude = make((12, 7), axis=axis)
    leaves = [t.requires_grad_() for t in (down, up, magnitude)]
    y = run_ours(LinearOperation(), axis, torch.randn(4, 7).double(), weight, bias, *leaves, 0.5)
    y.sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in leaves)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_adapter_is_an_identity_to_the_last_bit(case, axis, dtype):
    shape, input_shape, op, plain = CASES[case]
    weight, bias, down, up, _ = make(shape, dtype=torch.float32, axis=axis)
    weight, bias, up = weight.to(dtype), bias.to(dtype), torch.zeros_like(up)
    x = torch.randn(input_shape).to(dtype)
    y = run_ours(op, axis, x, weight, bias, down, up, weight_norm(weight, axis), 2.0)
    assert torch.equal(y, plain(x, weight, bias))


@pytest.mark.parametrize("axis", AXES)
def test_a_zero_channel_gives_zeros_and_no_nan(axis):
    weight, bias, down, up, magnitude = make((12, 7), axis=axis)
    channel = (0, slice(None)) if axis == "output" else (slice(None), 0)
    weight[channel] = 0
    up = torch.zeros_like(up)
    magnitude = weight_norm(weight, axis)
    leaves = [t.requires_grad_() for t in (torch.randn(4, 7).double(), down, up, magnitude)]
    y = run_ours(LinearOperation(), axis, leaves[0], weight, bias, *leaves[1:], 1.0)
    y.sum().backward()
    assert torch.equal(y.detach(), F.linear(leaves[0].detach(), weight, bias))
    assert all(torch.isfinite(t.grad).all() for t in leaves)


def test_low_precision_keeps_updates_that_rounding_the_weight_would_lose():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator).bfloat16()
    down = torch.randn(4, 64, generator=generator)
    up = 5e-4 * torch.randn(64, 4, generator=generator)
    magnitude = weight_norm(weight, "output")
    # Inputs lie along A, as trained ones do: the update is small in every weight, not in y.
    x = (torch.randn(4096, 4, generator=generator) @ down).bfloat16()
    exact = reference_weight(*(t.double() for t in (weight, down, up, magnitude)), 1.0, "output")
    wanted = F.linear(x.double(), exact - weight.double())
    merged = F.linear(x.double(), exact.bfloat16().double() - weight.double())
    y = run_ours(LinearOperation(), "output", x, weight, None, down, up, magnitude, 1.0)
    change = y.double() - F.linear(x, weight).double()

    def share(found):
        """How much of the wanted change is there: noise averages out, a lost update does not."""
        return ((found * wanted).sum() / wanted.square().sum()).item()

    assert abs(share(change) - 1) < 0.1
    assert abs(share(merged) - 1) > 0.3
