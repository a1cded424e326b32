"""The page against a dense float64 reference: the adapted weight, outputs and gradients.

`alone` computes with a layer's own factors, `planned` with those of a plan, and `direct` with those
of a plan that can take no gradient from the output.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dora_diffusion.adapters.scales import make_scales
from dora_diffusion.adapters.site import Site, WeightStatistics
from dora_diffusion.numerics.dora import (
    adapted_norm,
    adapted_weight,
    at_strength,
    dora_forward,
    factors_of,
    gain,
    interpolated_magnitude,
    sum_of_adapters,
    weight_norm,
)
from dora_diffusion.numerics.operation import ConvOperation, Operation
from dora_diffusion.numerics.weights import LayerWeights, MergeError, out_in

AXES = ("output", "input")


def alone(op, x, weight, bias, layer):
    return dora_forward(op, x, weight, bias, factors_of(weight, bias, layer, x.dtype))


def planned(op, x, weight, bias, layer, **options):
    statistics = WeightStatistics(weight, layer.norm_axis)
    site = Site(weight, bias, [layer], statistics, **options)
    return dora_forward(op, x, weight, bias, make_scales([site])[0].factors(x.dtype))


def direct(*args):
    return planned(*args, keep_output=False)


WAYS = pytest.mark.parametrize("way", [alone, planned, direct])
# kind -> (weight shape, input shape, operation, the same operation in plain torch)
CASES = {
    "linear": ((12, 7), (5, 9, 7), Operation(), F.linear),
    "linear square": ((8, 8), (3, 8), Operation(), F.linear),
    "linear, one row": ((12, 7), (7,), Operation(), F.linear),
    "conv 1x1": ((6, 10, 1, 1), (2, 10, 4, 5), ConvOperation(), F.conv2d),
    "conv 1x1 strided": (
        (6, 10, 1, 1),
        (2, 10, 4, 5),
        ConvOperation(stride=(2, 2)),
        lambda x, w, b=None: F.conv2d(x, w, b, stride=2),
    ),
    "conv 3x3, one pixel": (
        (6, 5, 3, 3),
        (1, 5, 1, 1),
        ConvOperation(padding=(1, 1)),
        lambda x, w, b=None: F.conv2d(x, w, b, padding=1),
    ),
    "conv strided, padded and dilated": (
        (8, 4, 3, 2),
        (2, 4, 11, 9),
        ConvOperation(stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        lambda x, w, b=None: F.conv2d(x, w, b, stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
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


def gradients(function, leaves, upstream):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def compare(case, axis, ours, reference, tolerance=1e-12, dtype=torch.float64, bias=True):
    """A function of (op, x, W, b, layer) against one of (plain op, x, W, b, A, B, m)."""
    shape, input_shape, op, plain = CASES[case]
    weight, b, down, up, magnitude = make(shape, axis=axis, bias=bias)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(input_shape, generator=g, dtype=torch.float64)
    upstream = torch.randn(plain(x, weight, b).shape, generator=g, dtype=torch.float64)
    # What is computed in a dtype is given in it; factors and magnitude are float32 or wider.
    x, weight, upstream = (t.to(dtype).double() for t in (x, weight, upstream))
    b = None if b is None else b.to(dtype).double()
    leaves = (x, down, up, magnitude)
    expected = gradients(
        lambda x, *factors: reference(plain, x, weight, b, *factors), leaves, upstream
    )
    wide = dtype if dtype.itemsize > 2 else torch.float32
    found = gradients(
        lambda x, *factors: ours(
            op, x, weight.to(dtype), None if b is None else b.to(dtype),
            LayerWeights(*factors, 1.7 * 3, axis),
        ),
        [x.to(dtype), *(leaf.to(wide) for leaf in leaves[1:])],
        upstream,
    )  # fmt: skip
    for one, other in zip(found, expected, strict=True):
        limit = tolerance * other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=limit)


def dense(axis):
    """The definition: the plain operation with the dense ``W'``."""
    return lambda plain, x, weight, bias, *factors: plain(
        x, reference_weight(weight, *factors, 1.7, axis), bias
    )


# dtype -> largest difference of an output or gradient, as a share of its largest number: for 16
# bits, a few roundings of activations.
DTYPES = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: 4 * 2**-8,
    torch.float16: 4 * 2**-11,
}


@WAYS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_the_definitions(case, axis, bias, dtype, way):
    compare(case, axis, way, dense(axis), DTYPES[dtype], dtype, bias)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
def test_a_strength_moves_the_magnitude_from_the_bases_norm(case, axis):
    def ours(op, x, weight, bias, layer):
        return dora_forward(op, x, weight, bias, factors_of(weight, bias, layer, x.dtype, 0.4))

    def reference(plain, x, weight, bias, down, up, magnitude):
        start = dense_norm(weight, axis).flatten()
        moved = start + 0.4 * (magnitude - start)
        return plain(x, reference_weight(weight, down, up, moved, 1.7, axis), bias)

    compare(case, axis, ours, reference)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
def test_several_adapters_are_a_sum_of_differences_each_of_its_own_input(case, axis):
    """One of strength 0.3, and a LoRA and another whose input dropout has changed."""

    def adapters(layer):
        lora = LayerWeights(2 * layer.down, layer.up, None, layer.alpha)
        return (layer, 0.3, 1.0), (lora, 1.0, 0.5), (layer, 1.0, 0.5)

    def ours(op, x, weight, bias, layer):
        terms = [
            (factors_of(weight, bias, one, x.dtype), strength, x if by == 1 else by * x)
            for one, strength, by in adapters(layer)
        ]
        return sum_of_adapters(op, x, weight, bias, terms)

    def reference(plain, x, weight, bias, down, up, magnitude):
        adapted = reference_weight(weight, down, up, magnitude, 1.7, axis)
        low_rank = 1.7 * (up.flatten(1) @ (2 * down).flatten(1)).view_as(weight)
        y = plain(x, weight + 0.3 * (adapted - weight), bias)
        return y + plain(0.5 * x, adapted - weight + low_rank)

    compare(case, axis, ours, reference)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(12, 7), (6, 5, 3, 3)])
def test_norms_are_dense_sums_and_constants(axis, shape):
    weight, _, down, up, magnitude = make(shape, axis=axis)
    layer = LayerWeights(down.requires_grad_(), up.requires_grad_(), magnitude, 6.0, axis)
    direction = weight + 2 * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    expected = dense_norm(direction, axis).flatten().detach()
    norm = adapted_norm(weight, layer)
    assert not norm.requires_grad
    torch.testing.assert_close(norm, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gain(magnitude, norm), magnitude / expected, rtol=1e-12, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        norm = adapted_norm(weight.float(), layer.to(torch.float32))
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    half = weight.bfloat16()
    expected = dense_norm(half.double() + direction - weight, axis).flatten().detach()
    norm = adapted_norm(half, layer.to(torch.float32))
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@WAYS
def test_a_fresh_adapter_is_an_identity_to_the_last_bit(case, axis, dtype, way):
    shape, input_shape, op, plain = CASES[case]
    weight, bias, down, up, _ = make(shape, dtype=torch.float32, axis=axis)
    weight, bias = weight.to(dtype), bias.to(dtype)
    layer = LayerWeights(down, torch.zeros_like(up), weight_norm(weight, axis), 5.0, axis)
    x = torch.randn(input_shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(way(op, x, weight, bias, layer), plain(x, weight, bias))
    assert torch.equal(adapted_weight(weight, layer).to(dtype), weight)


@WAYS
def test_low_precision_keeps_updates_that_rounding_the_weight_would_lose(way):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=g).bfloat16()
    down, up = torch.randn(4, 64, generator=g), 5e-4 * torch.randn(64, 4, generator=g)
    layer = LayerWeights(down, up, weight_norm(weight, "output"), 4.0)
    # Inputs lie along A, as trained ones do: the update is small in every weight, not in y.
    x = (torch.randn(4096, 4, generator=g) @ down).bfloat16()
    exact = adapted_weight(weight.double(), layer.to(torch.float64)) - weight.double()
    wanted = F.linear(x.double(), exact)
    y = way(Operation(), x, weight, None, layer)
    change = y.double() - F.linear(x, weight).double()
    # How much of the change is there: noise averages out, a lost update does not.
    share = ((change * wanted).sum() / wanted.square().sum()).item()
    assert abs(share - 1) < 0.1


@WAYS
@pytest.mark.parametrize("axis", AXES)
def test_a_zero_channel_gives_zeros_and_no_nan(axis, way):
    weight, bias, down, up, _ = make((12, 7), axis=axis)
    weight[(0, slice(None)) if axis == "output" else (slice(None), 0)] = 0
    x, magnitude = torch.randn(4, 7).double(), weight_norm(weight, axis)
    leaves = [t.requires_grad_() for t in (x, down, torch.zeros_like(up), magnitude)]
    layer = LayerWeights(*leaves[1:], 1.0, axis)
    y = way(Operation(), x, weight, bias, layer)
    y.sum().backward()
    torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=1e-14, atol=1e-14)
    assert all(torch.isfinite(t.grad).all() for t in leaves)


def test_a_gain_is_the_quotient_down_to_the_floor_and_0_from_there():
    norm, magnitude = torch.tensor(
        [[1e-10, 1e-29, 1e-30, 1e-31, 0.0], [2e-10, 3e-29, 1.0, 1.0, 1.0]], dtype=torch.float64
    )
    expected = torch.tensor([2.0, 3, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(gain(magnitude, norm), expected, rtol=1e-12, atol=0)
    half = gain(torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([1.25]))
    assert torch.equal(half, torch.tensor([1.2]))


def test_a_magnitude_of_16_bits_is_interpolated_in_float32():
    weight, _, down, up, magnitude = make((12, 7))
    layer = LayerWeights(down, up, magnitude.bfloat16(), 3.0)
    start = dense_norm(weight, "output").flatten()
    for strength in (1.0, 0.4):
        found = interpolated_magnitude(weight.float(), layer, strength)
        assert found.dtype == torch.float32
        expected = start + strength * (layer.magnitude.double() - start)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("axis", AXES)
def test_a_weight_of_16_bits_is_adapted_in_float32(axis):
    weight, _, down, up, magnitude = make((12, 7), axis=axis)
    weight, layer = weight.bfloat16(), LayerWeights(down, up, magnitude, 1.5, axis)
    expected = reference_weight(weight.double(), down, up, magnitude, 0.5, axis)
    found = adapted_weight(weight, layer.to(torch.float32))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    lora = LayerWeights(down.float(), up.float(), None, 1.5)
    exact = weight.double() + 0.5 * up.float().double() @ down.float().double()
    torch.testing.assert_close(adapted_weight(weight.double(), lora), exact, rtol=0, atol=1e-14)


@WAYS
@pytest.mark.parametrize("axis", AXES)
def test_zero_and_tiny_magnitudes_have_exact_gradients(axis, way):
    weight, bias, down, up, magnitude = make((12, 7), axis=axis)
    magnitude[0], magnitude[1] = 0, 1e-9
    x, upstream = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)
    expected = gradients(
        lambda m: F.linear(x, reference_weight(weight, down, up, m, 0.5, axis), bias),
        [magnitude],
        upstream,
    )
    found = gradients(
        lambda m: way(Operation(), x, weight, bias, LayerWeights(down, up, m, 1.5, axis)),
        [magnitude],
        upstream,
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@WAYS
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shrink", [1.0, 1e-4])
def test_the_magnitude_gradient_of_float16_does_not_overflow(case, axis, way, shrink):
    """Under a loss scale: each product with an output is beyond float16, and no gradient is."""
    shape, input_shape, op, plain = CASES[case]
    weight, bias, down, up, magnitude = make(shape, axis=axis)
    magnitude[0] *= shrink  # A small gain makes a layer direct.
    g = torch.Generator().manual_seed(1)
    x = 30 * torch.randn(input_shape, generator=g, dtype=torch.float64)
    upstream = torch.randn(plain(x, weight, bias).shape, generator=g, dtype=torch.float64) * 2000
    half = [t.half() for t in (x, weight, bias, upstream)]
    x, weight, bias, upstream = (t.double() for t in half)
    down, up, magnitude = (t.float().double() for t in (down, up, magnitude))
    _, expected = gradients(
        lambda m: plain(x, reference_weight(weight, down, up, m, 0.1, axis), bias),
        [magnitude],
        upstream,
    )

    def ours(x, m):
        return way(op, x, *half[1:3], LayerWeights(down.float(), up.float(), m, 0.3, axis))

    y, _, found = gradients(ours, [half[0], magnitude.float()], half[3])
    assert (y.float().abs().max() * half[3].float().abs().max()).item() > 65504
    assert found.dtype == torch.float32
    limit = 5e-3 * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=limit)


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


def test_layer_weights_refuse_shapes_that_do_not_belong_together():
    down, up = torch.zeros(2, 5), torch.zeros(6, 2)
    with pytest.raises(ValueError, match="do not multiply"):
        LayerWeights(down, torch.zeros(6, 3))
    with pytest.raises(ValueError, match=r"needs \(6,\)"):
        LayerWeights(down, up, torch.zeros(5))
    with pytest.raises(ValueError, match="for a weight of shape"):
        adapted_weight(torch.zeros(5, 6), LayerWeights(down, up))


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


@pytest.mark.parametrize("strength", [-1.0, 0.25, 0.7, 1.5])
@pytest.mark.parametrize("kind", ["plain", "embedding", "conv1d", "conv"])
@pytest.mark.parametrize("axis", AXES)
def test_a_layer_at_a_strength_is_a_layer_of_the_same_rank(axis, kind, strength):
    """A zero channel stays zero, and a channel whose norm is lost has the rest of W."""
    generator = torch.Generator().manual_seed(0)
    kernel = (3, 3) if kind == "conv" else ()
    weight = torch.randn(6, 5, *kernel, generator=generator)
    weight.select(0 if axis == "output" else 1, 2).zero_()
    down = torch.randn(2, 5, *kernel, generator=generator)
    up = torch.randn(6, 2, *[1] * len(kernel), generator=generator)
    magnitude = weight_norm(weight, axis) * 1.3
    magnitude[1] = 0
    layer = LayerWeights(down, up, magnitude, 3.0, axis, "plain" if kind == "conv" else kind)
    stored = out_in(weight, layer.kind)
    scaled = at_strength(stored, layer, strength)
    assert (scaled.rank, scaled.norm_axis, scaled.kind) == (2, axis, layer.kind)
    expected = adapted_weight(weight, layer, strength=strength)
    torch.testing.assert_close(adapted_weight(weight, scaled), expected, rtol=1e-5, atol=1e-6)


def test_a_strength_that_takes_the_base_away_is_refused():
    weight, down, up = torch.eye(2), torch.ones(1, 2), torch.tensor([[0.0], [1.0]])
    layer = LayerWeights(down, up, torch.tensor([0.5, 1.0]), 1.0)
    with pytest.raises(MergeError, match="strength 2 removes the base weight from a channel"):
        at_strength(weight, layer, 2.0)
