"""DoRA's outputs and gradients against a dense float64 autograd reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from dora_diffusion.numerics import autograd as dora_autograd
from dora_diffusion.numerics import gain as gain_module
from dora_diffusion.numerics.autograd import dora, folds
from dora_diffusion.numerics.dora import (
    adapted_norm,
    adapted_weight,
    change_and_checksum,
    checksum,
    merged_weight,
    squared_norm,
    weight_norm,
)
from dora_diffusion.numerics.gain import GainInputs, WeightFacts, make_gain, make_gains
from dora_diffusion.numerics.operation import Conv2dOperation, LinearOperation
from dora_diffusion.numerics.weights import LayerWeights

AXES = ("output", "input")
# kind -> (weight shape, input shape, operation, the same operation in plain torch)
CASES = {
    "linear": ((12, 7), (5, 9, 7), LinearOperation(), F.linear),
    "linear square": ((8, 8), (3, 8), LinearOperation(), F.linear),
    "conv 3x3": (
        (6, 5, 3, 3),
        (2, 5, 9, 8),
        Conv2dOperation(padding=(1, 1)),
        lambda x, w, b=None: F.conv2d(x, w, b, padding=1),
    ),
    "conv 1x1": ((6, 10, 1, 1), (2, 10, 4, 5), Conv2dOperation(), F.conv2d),
    "conv strided": (
        (8, 4, 3, 3),
        (2, 4, 9, 7),
        Conv2dOperation(stride=(2, 2), padding=(1, 1)),
        lambda x, w, b=None: F.conv2d(x, w, b, stride=2, padding=1),
    ),
    "conv dilated": (
        (4, 6, 3, 3),
        (1, 6, 10, 10),
        Conv2dOperation(padding=(2, 2), dilation=(2, 2)),
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
    norm = adapted_norm(weight, down.detach(), up.detach(), scale, axis)
    gain = make_gain(magnitude, norm)
    return dora(op, axis, x, weight, bias, down, up, magnitude, gain, scale, **kwargs)


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
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_equal_the_dense_float64_reference(
    case, axis, fold, bias, monkeypatch
):
    monkeypatch.setattr(dora_autograd, "folds", lambda *_: fold)
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


@example(out=17, fan_in=1, rank=5, kernel=None, axis="output", seed=2)
@given(
    out=st.integers(1, 20),
    fan_in=st.integers(1, 20),
    rank=st.integers(1, 6),
    kernel=st.sampled_from([None, 1, 3]),
    axis=st.sampled_from(AXES),
    seed=st.integers(0, 1000),
)
def test_factored_norm_equals_the_dense_norm(out, fan_in, rank, kernel, axis, seed):
    shape = (out, fan_in) if kernel is None else (out, fan_in, kernel, kernel)
    weight, _, down, up, _ = make(shape, rank, axis, seed=seed)
    delta = 0.8 * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    expected = dense_norm(weight + delta, axis).flatten()
    actual = adapted_norm(weight.float(), down.float(), up.float(), 0.8, axis)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-6)


@st.composite
def layers(draw):
    """A layer whose ranks or whose weight and update may cancel, in float32, with its scale."""
    axis, rank = draw(st.sampled_from(AXES)), draw(st.integers(1, 6))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3)]))
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 20)), *kernel)
    weight, _, down, up, _ = make(shape, rank, axis, seed=draw(st.integers(0, 1000)))
    scale = draw(st.sampled_from([-3.0, -0.8, 0.1, 0.8, 30.0]))
    if rank > 1 and draw(st.booleans()):
        down[1], up[:, 1] = down[0], -up[:, 0] * (1 + 1e-3)
    if draw(st.booleans()):
        delta = (up.flatten(1) @ down.flatten(1)).view_as(weight)
        weight = draw(st.sampled_from([1e-3, 0.1, 1.0])) * weight - scale * delta
    return weight.float(), down.float(), up.float(), scale, axis


@given(st.lists(layers(), min_size=1, max_size=4))
def test_norms_of_many_layers_equal_the_dense_norms(several):
    """All together, whatever cancels in them."""
    inputs = [
        GainInputs(torch.ones(len(known.squared_norm)), *layer, known)
        for layer in several
        for known in [WeightFacts(layer[0], layer[4])]
    ]
    for (weight, down, up, scale, axis), gain in zip(several, make_gains(inputs), strict=True):
        delta = (up.double().flatten(1) @ down.double().flatten(1)).view_as(weight)
        expected = dense_norm(weight.double() + scale * delta, axis).flatten()
        torch.testing.assert_close(gain.norm.double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("axis", AXES)
def test_a_cancelling_channel_falls_back_to_the_dense_norm(axis):
    weight, _, down, up, _ = make((6, 40), rank=6, axis=axis)
    # Choose B so that W + BA nearly vanishes: the factored norm would be rounding error.
    weight = -(up @ down) * (1 + 1e-4) if axis == "output" else -(up @ down) * (1 - 1e-4)
    weight, down, up = weight.float(), down.float(), up.float()
    exact = dense_norm(weight.double() + up.double() @ down.double(), axis).flatten()
    actual = adapted_norm(weight, down, up, 1.0, axis)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fold", [True, False])
def test_a_fresh_adapter_is_an_identity_to_the_last_bit(case, axis, dtype, fold, monkeypatch):
    shape, input_shape, op, plain = CASES[case]
    monkeypatch.setattr(dora_autograd, "folds", lambda *args: fold and args[-1] is torch.float32)
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


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(12, 7), (6, 5, 3, 3), (8, 8)])
def test_adapted_weight_is_the_definition(axis, shape):
    weight, _, down, up, magnitude = make(shape, axis=axis)
    layer = LayerWeights(down, up, magnitude, alpha=4.5, norm_axis=axis)
    expected = reference_weight(weight, down, up, magnitude, 1.5, axis)
    torch.testing.assert_close(adapted_weight(weight, layer), expected, rtol=1e-12, atol=1e-12)
    half = adapted_weight(weight, layer, strength=0.5)
    torch.testing.assert_close(half, weight + 0.5 * (expected - weight), rtol=1e-12, atol=1e-12)
    assert torch.equal(adapted_weight(weight, layer, strength=0.0), weight)
    no_direction = adapted_weight(weight, layer, direction_strength=0.0)
    scaled = magnitude.view_as(dense_norm(weight, axis)) * weight / dense_norm(weight, axis)
    torch.testing.assert_close(no_direction, scaled, rtol=1e-12, atol=1e-12)
    kept = adapted_weight(weight, layer, magnitude_strength=0.0)
    torch.testing.assert_close(dense_norm(kept, axis), dense_norm(weight, axis))


def test_several_adapters_sum_their_differences_in_any_order():
    weight, _, down, up, magnitude = make((12, 7), dtype=torch.float32)
    first = adapted_weight(weight, LayerWeights(down, up, magnitude, 3.0))
    second = adapted_weight(weight, LayerWeights(down.flip(0), up, magnitude, 1.0))
    both = merged_weight(weight, [first, second])
    assert torch.equal(both, merged_weight(weight, [second, first]))
    torch.testing.assert_close(both, first + second - weight)


def test_low_precision_never_folds():
    weight = torch.zeros(64, 64)
    assert folds(10_000, weight, 8, torch.float32)
    assert not folds(10_000, weight, 8, torch.bfloat16)
    assert not folds(4, weight, 8, torch.float32)


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
    folded = F.linear(x.double(), exact.bfloat16().double() - weight.double())
    y = run_ours(LinearOperation(), "output", x, weight, None, down, up, magnitude, 1.0)
    change = y.double() - F.linear(x, weight).double()

    def share(found):
        """How much of the wanted change is there: noise averages out, a lost update does not."""
        return ((found * wanted).sum() / wanted.square().sum()).item()

    assert abs(share(change) - 1) < 0.1
    assert abs(share(folded) - 1) > 0.3


def test_layer_weights_refuse_shapes_that_do_not_belong_together():
    down, up = torch.zeros(2, 5), torch.zeros(6, 2)
    with pytest.raises(ValueError, match="do not multiply"):
        LayerWeights(down, torch.zeros(6, 3))
    with pytest.raises(ValueError, match=r"needs \(6,\)"):
        LayerWeights(down, up, torch.zeros(5))
    with pytest.raises(ValueError, match="for a weight of shape"):
        adapted_weight(torch.zeros(5, 6), LayerWeights(down, up))


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("shape", [(6, 5), (320, 768), (6, 5, 3, 3), (640, 320, 3, 3)])
def test_a_checksum_tells_a_weight_from_one_with_a_changed_channel(axis, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    down = torch.randn(2, *shape[1:])
    up = torch.randn(shape[0], 2, *[1] * (len(shape) - 2))
    known = checksum(weight, axis)
    change, same = change_and_checksum(weight, down, up, 0.5, axis)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_channel_of_zeros_stays_zero_whatever_its_magnitude(dtype):
    from dora_diffusion.adapters.inject import inject_adapters, merge_adapters
    from dora_diffusion.config import AdapterConfig

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32)).to(dtype)
    model[0].weight.data[2] = 0
    inject_adapters(model, AdapterConfig(targets=("full",), rank=2))
    model[0].adapters["default"].magnitude.data += 0.01
    x = torch.randn(2, 64).to(dtype)
    adapted = model(x)
    assert torch.equal(adapted[:, 2], model[0].bias[2].expand(2))
    merge_adapters(model)
    torch.testing.assert_close(model(x), adapted, rtol=0.01, atol=0.01)


def test_facts_of_a_weight_are_renewed_when_it_was_written_to(monkeypatch):
    """Once: a layer whose weight was written through ``.data`` is not looked at twice for ever."""
    weight, down, up = torch.randn(8, 6), torch.randn(2, 6), torch.randn(8, 2)
    known = WeightFacts(weight, "output")
    careful = []
    plain = gain_module._careful
    monkeypatch.setattr(gain_module, "_careful", lambda one: careful.append(1) or plain(one))
    for expected in (0, 1, 1):
        if expected:
            weight.data.mul_(1.0 if careful else 1.5)
        magnitude = weight_norm(weight, "output")
        inputs = GainInputs(magnitude, weight, down, up, 0.5, "output", known)
        (gain,) = make_gains([inputs])
        assert len(careful) == expected
        dense = (weight.double() + 0.5 * up.double() @ down.double()).norm(dim=1)
        torch.testing.assert_close(gain.norm.double(), dense, rtol=1e-5, atol=0)


def test_a_fake_forward_leaves_no_fake_tensor_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    length = 4099  # No other test has asked for it.
    with FakeTensorMode():
        checksum(torch.empty(3, length), "output")
    found = checksum(torch.ones(3, length), "output")
    assert type(found) is torch.Tensor
    assert torch.isfinite(found).all()
