"""Merging: against a dense float64 computation, in every dtype, and how far rounding takes it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dora_diffusion.numerics import merging
from dora_diffusion.numerics.dora import adapted_weight, weight_norm
from dora_diffusion.numerics.merging import (
    WeightedAdapter,
    cast_error,
    layers_of,
    merge_error,
    merge_tensor,
    merged_weight,
)
from dora_diffusion.numerics.weights import LayerWeights, MergeError, NormAxis, Strengths


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
    with pytest.raises(ValueError, match="have kinds embedding and plain"):
        merge_tensor(torch.ones(4, 4), [(layer, Strengths()), (other, Strengths())])


SHAPES = [(6, 10), (8, 8), (10, 4, 1, 1), (6, 6, 3, 3), (4, 7, 3, 3)]


def layer_for(
    weight: Tensor, seed: int, axis: NormAxis | None = "output", rank: int = 3, alpha: float = 5.0
) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)
    out, into, *kernel = weight.shape
    down = torch.randn(rank, into, *kernel, generator=generator)
    up = 0.3 * torch.randn(out, rank, *[1] * len(kernel), generator=generator)
    if axis is None:
        return LayerWeights(down, up, None, alpha)
    size = out if axis == "output" else into
    return LayerWeights(down, up, 0.5 + torch.rand(size, generator=generator), alpha, axis)


def dense_merge(weight: Tensor, layer: LayerWeights, strength: float = 1.0) -> Tensor:
    """The paper's formula, spelled out in float64 with einsum and explicit sums."""
    base = weight.double()
    down, up = layer.down.double(), layer.up.double().flatten(1)
    changed = base + layer.alpha / layer.rank * torch.einsum("or,ri...->oi...", up, down)
    if layer.magnitude is not None:
        along_output = layer.norm_axis == "output"
        dims = [d for d in range(base.ndim) if d != (0 if along_output else 1)]
        norm = (changed**2).sum(dim=dims, keepdim=True).sqrt()
        changed = layer.magnitude.double().reshape(norm.shape) * changed / norm
    return base + strength * (changed - base)


@pytest.mark.parametrize(
    "axes", [("output",), ("input",), (None,), ("output", "input"), ("input",) * 2]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [1, 37, 10**6])
def test_blocks_do_not_change_the_result(
    shape: tuple[int, ...],
    axes: tuple[NormAxis | None, ...],
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A large weight is merged some channels at a time; here, down to one."""
    monkeypatch.setattr(merging, "_BLOCK", block)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    layers = [layer_for(weight, 2 + i, axis) for i, axis in enumerate(axes)]
    merged = merge_tensor(weight, [(layer, Strengths(0.5)) for layer in layers])
    base = weight.double()
    expected = base + sum(dense_merge(weight, layer, 0.5) - base for layer in layers)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """The merge happens in float32: the result is the correctly rounded one."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    layer = layer_for(weight, 4)
    exact = dense_merge(weight, layer)
    merged = merge_tensor(weight, [(layer, Strengths())])
    step = torch.finfo(dtype).eps
    assert ((merged.double() - exact).abs() <= 0.501 * step * exact.abs() + 1e-7).all()
    wide = merge_tensor(weight, [(layer, Strengths())], torch.float32)
    torch.testing.assert_close(wide.double(), exact, rtol=1e-6, atol=1e-6)


def test_only_the_layers_of_a_weight_are_merged_into_it() -> None:
    layer, other = (layer_for(torch.randn(4, 6), seed) for seed in (0, 1))
    adapters = [
        WeightedAdapter({"unet.a": layer, "unet.b": other}),
        WeightedAdapter({"unet.a": other}),
    ]
    assert layers_of("unet.a.weight", adapters) == [(layer, Strengths()), (other, Strengths())]
    assert layers_of("unet.b.weight", adapters) == [(other, Strengths())]
    assert layers_of("unet.a.bias", adapters) == layers_of("unet.a", adapters) == []


def test_a_result_beyond_the_dtype_is_an_error() -> None:
    weight = torch.full((2, 2), 6e4, dtype=torch.float16)
    layer = LayerWeights(torch.ones(1, 2), torch.full((2, 1), 6e4), None, 1.0)
    with pytest.raises(MergeError, match="not finite"):
        merge_tensor(weight, [(layer, Strengths())])
    broken = torch.tensor([[1.0, float("nan")], [1.0, 1.0]])
    with pytest.raises(MergeError, match="not finite"):
        merge_tensor(broken, [(LayerWeights(torch.zeros(1, 2), torch.zeros(2, 1)), Strengths())])


def test_a_weight_that_nothing_acts_on_is_cast_if_the_dtype_holds_it() -> None:
    for weight in (torch.tensor(4.5), torch.tensor([[1.0, -float("inf")]]), torch.tensor([7])):
        assert torch.equal(merge_tensor(weight, [], torch.float16), weight.half())
    with pytest.raises(MergeError, match=r"weight \(2,\) has values beyond the range of float16"):
        merge_tensor(torch.tensor([1.0, 1e5]), [], torch.float16)
    # A sum that overflows on its own is none of them.
    large = torch.full((4,), 3e38)
    assert torch.equal(merge_tensor(large.double(), [], torch.float32), large)


# Shapes whose blocks leave a short last one, on either axis.
_MERGE_WITH_THREADS = """
import hashlib, torch
from dora_diffusion.adapters.layers import LayerAdapter
from dora_diffusion.adapters.kinds import adapt_layer
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.numerics.weights import LayerWeights

for threads in (1, 2, 4):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    for shape in ((320, 640, 3, 3), (2560, 333), (640, 320)):
        for axis in ("output", "input"):
            out, into, *kernel = shape
            weight = torch.randn(shape, generator=generator)
            down = torch.randn(4, into, *kernel, generator=generator) / 100
            up = torch.randn(out, 4, *[1] * len(kernel), generator=generator) / 100
            magnitude = 1 + torch.rand(out if axis == "output" else into, generator=generator)
            layer = LayerWeights(down, up, magnitude, 4.0, axis)
            shifted = torch.empty(weight.numel() + 1)[1:].view(shape).copy_(weight)
            sizes = (into, out, 3) if kernel else (into, out)
            kind = torch.nn.Conv2d if kernel else torch.nn.Linear
            module = kind(*sizes, bias=False)
            module.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
            adapted = adapt_layer(module)
            adapted.adapters["default"] = LayerAdapter(layer)
            for result in (
                merge_tensor(weight, [(layer, Strengths())]),
                merge_tensor(shifted, [(layer, Strengths())]),
                adapted.merged(),
            ):
                print(shape, axis, hashlib.sha256(result.numpy()).hexdigest())
    assert torch.get_num_threads() == threads
"""


def test_a_merge_is_the_same_bits_on_any_number_of_threads() -> None:
    """As users have it: without MKL's reproducible mode, which the other tests run in."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MKL_CBWR", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", _MERGE_WITH_THREADS],
        env=environment, capture_output=True, text=True, check=True, encoding="utf-8",
    )  # fmt: skip
    lines = done.stdout.splitlines()
    outputs = [lines[:18], lines[18:36], lines[36:]]
    assert len(outputs[0]) == 18
    assert outputs[1] == outputs[0]
    assert outputs[2] == outputs[0]
    # One formula: where the weight lies in memory, and whether it is a live layer's, is no matter.
    assert len(set(outputs[0])) == 6
