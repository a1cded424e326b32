"""Packed weights, against the published levels, plain loops and dense products in float64."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.adapters.inject import inject_adapters, merge_adapters
from dora_diffusion.config import AdapterConfig
from dora_diffusion.numerics.quantised import LEVELS, QUANTISATIONS, NF4Weight, quantise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.05 * torch.randn(shape, generator=generator)).to(dtype)


def by_loops(matrix: Tensor, kind: str) -> Tensor:
    """The dequantised weight in float64, before it is rounded, number by number."""
    made = []
    for row in matrix.double().flatten(1):
        found = []
        for block in row.split(64 if kind == "nf4" else len(row)):
            top = block.abs().max()
            for value in (block / top).tolist():
                if kind == "nf4":
                    found.append(min(LEVELS, key=lambda level: abs(level - value)) * top)
                else:
                    found.append(round(value * 127) / 127 * top)
        numbers = torch.stack(found)
        made.append(numbers * row.norm() / numbers.norm())
    return torch.stack(made).view(matrix.shape)


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    """As QLoRA's authors compute them: 8 above 0 and 7 below, the outermost of the mean of 1/30
    and 1/32 in the tail, over the greatest.
    """
    inverse = statistics.NormalDist().inv_cdf
    above, below = (torch.linspace(0.9677083, 0.5, n)[:-1].tolist() for n in (9, 8))
    numbers = [*map(inverse, above), 0.0, *(-inverse(share) for share in below)]
    found = torch.tensor(sorted(numbers))
    assert tuple((found / found.max()).tolist()) == LEVELS


def test_scales_in_8_bits_are_off_by_half_a_step_at_most() -> None:
    matrix = weight((300, 128)) * torch.linspace(0.1, 3, 300)[:, None]
    packed = quantise(matrix, "nf4")
    assert isinstance(packed, NF4Weight)
    exact = by_loops(matrix, "nf4").view(-1, 64).abs().amax(1)
    for tops, found in zip(exact.split(256), packed.tops().flatten().split(256), strict=True):
        step = (tops.max() - tops.min()) / 255
        assert ((found - tops).abs() <= 0.5001 * step).all()
    # 4 bits, and 8 for 64 numbers, and two floats for 256 blocks, of which there are 600.
    held = sum(tensor.nbytes for tensor in packed.tensors.values())
    assert held == matrix.numel() // 2 + 600 + 8 * 3


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_a_row_keeps_its_norm(kind: Any) -> None:
    """To what the scales' 8 bits leave of it, which hits several blocks of a row both ways."""
    matrix = weight((64, 1280))
    norms = [torch.linalg.vector_norm(w.double(), dim=1) for w in (matrix, quantise(matrix, kind))]
    limit = {"int8": 1e-6, "nf4": 1e-3}[kind]
    assert ((norms[1] / norms[0] - 1).abs() < limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_values_are_rounded_to_the_models_dtype_whatever_is_asked_for(
    kind: Any, dtype: Any
) -> None:
    packed = quantise(weight((8, 96), dtype), kind)
    dense = packed.dense()
    assert (packed.dtype, dense.dtype, type(dense)) == (dtype, dtype, Tensor)
    for other in (torch.float32, torch.float64):
        assert torch.equal(packed.to(other).dense(), dense.to(other))
        assert torch.equal(packed.dense(other), dense.to(other))
    assert torch.equal(packed.rows(2, 5).to(dtype), dense[2:5])


def products(kind: str) -> dict[str, Any]:
    return {
        "linear": (lambda x, w, b: F.linear(x, w, b), (5, 7, 40), (24, 40)),
        "vector": (lambda x, w, b: F.linear(x, w, b), (40,), (24, 40)),
        "convolution": (
            lambda x, w, b: F.conv2d(x, w, b, stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
            *((2, 6, 9, 11), (10, 6, 3, 3)),
        ),
        "groups": (lambda x, w, b: F.conv2d(x, w, b, groups=3), (2, 6, 5, 5), (9, 2, 1, 1)),
        "single": (lambda x, w, b: F.conv2d(x, w, b, padding=1), (6, 5, 5), (10, 6, 3, 3)),
        "line": (lambda x, w, b: F.conv1d(x, w, b, padding=2), (2, 6, 9), (10, 6, 3)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", products(""))
@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_products_and_gradients_are_those_of_the_dense_weight(
    kind: Any, name: str, dtype: torch.dtype
) -> None:
    run, size, shape = products(kind)[name]
    packed = quantise(weight(shape, dtype), kind)
    x, bias = weight(size, dtype, 1), weight(shape[:1], dtype, 2)
    made, found = [], []
    for tensors in ((x, packed, bias), (x.double(), packed.dense(torch.float64), bias.double())):
        own, kernel, shift = tensors
        own, shift = own.clone().requires_grad_(), shift.clone().requires_grad_()
        output = run(own, kernel, shift)
        made.append(output)
        upstream = weight(tuple(output.shape), dtype, 3).to(output.dtype)
        found.append(torch.autograd.grad(output, (own, shift), upstream))
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip((made[0], *found[0]), (made[1], *found[1]), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= limit * theirs.norm()


def test_the_backward_pass_keeps_no_dense_weight() -> None:
    packed, kept = quantise(weight((64, 64)), "nf4"), []
    x = weight((2, 64)).requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.linear(x, packed)
    assert kept == []


def test_autocast_casts_what_a_dense_weight_s_product_would() -> None:
    packed, x = quantise(weight((24, 40)), "int8"), weight((3, 40))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = F.linear(x, packed), F.linear(x, packed.dense())
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_a_module_is_copied_and_cast_with_it(kind: Any) -> None:
    layer = nn.Linear(40, 24)
    layer.weight = nn.Parameter(quantise(layer.weight, kind), requires_grad=False)
    x, dense = weight((3, 40)), layer.weight.data.dense()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), F.linear(x, dense, layer.bias))
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    low = copy.deepcopy(layer).bfloat16()
    assert torch.equal(low.weight.data.dense(), dense.bfloat16())
    other = nn.Linear(40, 24)
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(x), layer(x))
    # Whatever else reads it sees the dense one.
    assert torch.equal(layer.weight.flatten() + 1, dense.flatten() + 1)


@pytest.mark.parametrize("change", [Tensor.mul_, Tensor.copy_, Tensor.add_])
def test_nobody_writes_to_it(change: Any) -> None:
    packed = quantise(weight((4, 64)), "nf4")
    with pytest.raises(RuntimeError, match=r"quantised to nf4 cannot be changed.* load "):
        change(packed, torch.ones(4, 64))


def test_what_cannot_be_quantised() -> None:
    for wrong in (quantise(weight((4, 64)), "nf4"), torch.ones(4, 4, dtype=torch.int8)):
        with pytest.raises(ValueError, match="already quantised"):
            quantise(wrong, "int8")


def test_adapters_are_not_merged_into_codes() -> None:
    """Nor into the dense layers beside them: the model is as it was."""
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64))
    inject_adapters(model, AdapterConfig(targets=("*",), rank=2))
    model[1].weight = nn.Parameter(quantise(model[1].weight, "nf4"), requires_grad=False)
    before = [layer.weight.clone() for layer in model]
    for keep_base in (False, True):
        with pytest.raises(ValueError, match=r"quantised.*dora-diffusion export"):
            merge_adapters(model, keep_base=keep_base)
    for layer, weight in zip(model, before, strict=True):
        assert torch.equal(layer.weight, weight)
        assert not layer.is_merged
    with pytest.raises(RuntimeError, match="cannot be changed"):
        model[1].merge(model[1].merged())
    assert not model[1].is_merged


@pytest.mark.parametrize(
    ("kind", "most", "otherwise"), [("int8", 0.002, 0.005), ("nf4", 0.02, 0.1)]
)
def test_an_adapter_of_the_codes_is_one_of_the_dense_weight(
    kind: Any, most: float, otherwise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative error of an update by 5%; far more if rows lost their norms."""
    matrix = weight((512, 640)).double()
    change = weight((512, 8), seed=1).double() @ weight((8, 640), seed=2).double()
    change *= 0.05 * matrix.norm() / change.norm()

    def off() -> float:
        codes = quantise(matrix.float(), kind).dense(torch.float64)
        magnitude = 1.01 * codes.norm(dim=1, keepdim=True)

        def update(base: Tensor) -> Tensor:
            moved = base + change
            return magnitude * moved / moved.norm(dim=1, keepdim=True) - base

        here, there = update(matrix), update(codes)
        return float((here - there).norm() / there.norm())

    assert off() < most
    monkeypatch.setattr(
        "dora_diffusion.numerics.quantised._restored", lambda rows, _: torch.ones(len(rows))
    )
    assert off() > otherwise
