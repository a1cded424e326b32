"""How far rounding takes a merge; what threads do to it is in `tests/test_merge.py`."""

from __future__ import annotations

import pytest
import torch

from dora_diffusion.adapters.merge import merge_tensor
from dora_diffusion.numerics import merging
from dora_diffusion.numerics.dora import adapted_weight, weight_norm
from dora_diffusion.numerics.merging import cast_error, merge_error, merged_weight
from dora_diffusion.numerics.weights import LayerWeights, NormAxis, Strengths


def test_the_cast_error_a_cast_is_bounded() -> None:
    """Against casts of numbers of all sizes, subnormal ones too."""
    exponents = torch.linspace(-60, 15, 100_000)
    values = 2.0**exponents * (1 + torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
    for dtype in (torch.float16, torch.bfloat16):
        usable = values[values < torch.finfo(dtype).max]
        error = (usable.to(dtype).float() - usable).abs()
        bound = cast_error(usable, dtype)
        assert (error <= bound).all()
        assert (error > 0.9 * bound).any()


@pytest.mark.parametrize("axis", ["output", "input", None])
@pytest.mark.parametrize("rank", [1, 4, 64])
@pytest.mark.parametrize("cancels", [False, True])
@pytest.mark.parametrize("knobs", [Strengths(), Strengths(0.7, 1.3, 0.4), Strengths(2.0, -1.0)])
def test_rounding_keeps_its_bound_and_the_bound_is_tight(
    axis: NormAxis | None, rank: int, cancels: bool, knobs: Strengths
) -> None:
    """Against the same merge in float64, also where ``W`` and ``sBA`` nearly cancel."""
    generator = torch.Generator().manual_seed(rank)
    for out, into, *kernel in ((64, 333), (24, 320, 3, 3), (320, 8, 1, 1)):
        down = torch.randn(rank, into, *kernel, generator=generator)
        up = torch.randn(out, rank, *[1] * len(kernel), generator=generator)
        weight = torch.randn(out, into, *kernel, generator=generator)
        if cancels:
            delta = (up.double().flatten(1) @ down.double().flatten(1)).view_as(weight)
            weight = (1e-3 * weight - knobs.direction_strength * delta).float()
        size = out if axis == "output" else into
        magnitude = None if axis is None else 1 + torch.rand(size, generator=generator)
        layer = LayerWeights(down, up, magnitude, float(rank), axis or "output")
        exact = merge_tensor(weight.double(), [(layer.to(torch.float64), knobs)])
        bound = merge_error(weight, [(layer, knobs)]).double()
        error = (merge_tensor(weight, [(layer, knobs)]).double() - exact).abs()
        assert (error <= 0.5 * bound).all()
        assert (error > 0.005 * bound).any()
        half = merge_tensor(weight, [(layer, knobs)], torch.float16).double()
        assert ((half - exact).abs() <= bound + cast_error(exact, torch.float16)).all()


def test_several_adapters_sum_their_differences_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(n, generator=generator) for n in ((12, 7), (3, 7), (12, 3)))
    magnitude = 1.3 * weight_norm(weight, "output")
    first = adapted_weight(weight, LayerWeights(down, up, magnitude, 3.0))
    second = adapted_weight(weight, LayerWeights(down.flip(0), up, magnitude, 1.0))
    both = merged_weight(weight, [first, second])
    assert torch.equal(both, merged_weight(weight, [second, first]))
    torch.testing.assert_close(both, first + second - weight)


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("block", [7, 2**18])
def test_a_transposed_weight_is_merged_and_bounded_as_it_is_stored(
    axis: NormAxis, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    table, down, up = (
        torch.randn(size, generator=generator) for size in ((300, 12), (3, 300), (12, 3))
    )
    start = weight_norm(table.t(), axis)
    layer = LayerWeights(down, up, 1.3 * start, 2.0, axis, "embedding")
    direction = table.double() + 2 / 3 * (up.double() @ down.double()).t()
    norm = direction.norm(dim=0 if axis == "output" else 1, keepdim=True)
    exact = 1.3 * start.double().view_as(norm) * direction / norm
    merged = merge_tensor(table, [(layer, Strengths())])
    assert merged.is_contiguous()
    torch.testing.assert_close(merged.double(), exact, rtol=1e-5, atol=1e-6)
    bound = merge_error(table, [(layer, Strengths())])
    assert ((merged.double() - exact).abs() <= 0.5 * bound).all()


def test_adapters_that_take_a_weight_for_different_kinds_are_refused() -> None:
    layer = LayerWeights(torch.ones(1, 4), torch.ones(4, 1))
    other = LayerWeights(layer.down, layer.up, kind="embedding")
    with pytest.raises(ValueError, match="take it for embedding and plain"):
        merge_tensor(torch.ones(4, 4), [(layer, Strengths()), (other, Strengths())])
