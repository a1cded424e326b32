"""The formula against a dense float64 reference, and what rounding must not lose of its layers.

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
    weight_norm,
)
from dora_diffusion.numerics.operation import Operation
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
