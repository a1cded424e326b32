"""Implementations of layers, all against `adapted_weight`: who computes, outputs and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from dora_diffusion.adapters.inject import adapter_parameters, disabled, inject_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import FixedNorms, norm_scope, row_scope
from dora_diffusion.adapters.stack import AdapterStack
from dora_diffusion.config import AdapterConfig
from dora_diffusion.numerics import dora
from dora_diffusion.numerics.dora import (
    adapted_weight,
    direct_forward,
    factors_of,
    fused_forward,
    input_forward,
    lora_forward,
    scaled_forward,
    sum_of_adapters,
    weight_norm,
)
from dora_diffusion.numerics.operation import Operation
from dora_diffusion.numerics.weights import LayerWeights, Strengths, out_in
from tests.emulation import OneDNN

IDS = (3, 5)
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(7, 5), (3, 6, 7)),
    "Linear of vectors": (lambda: nn.Linear(7, 7), (6, 7)),
    "Linear of one vector": (lambda: nn.Linear(7, 5), (7,)),
    "Linear of images": (lambda: nn.Linear(7, 5, bias=False), (3, 3, 4, 7)),
    "Linear of nothing": (lambda: nn.Linear(7, 5), (0, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (3, 4, 5, 7)),
    "Conv2d of one image": (lambda: nn.Conv2d(4, 6, 3, padding=1), (1, 4, 5, 7)),
    "Conv2d of no batch": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 7)),
    "Conv2d of one pixel": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 1, 1)),
    "Conv2d, 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 3)),
    "Conv2d, strided": (
        lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), bias=False),
        (2, 4, 11, 9),
    ),
    "Conv2d, reflected": (
        lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
        (2, 4, 6, 6),
    ),
    "Conv1D": (lambda: Conv1D(5, 7), (3, 6, 7)),
    "Conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 5, 7)),
    "Conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (3, 4, 5, 7)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 7)),
    "Conv1d, grouped": (
        lambda: nn.Conv1d(4, 6, 3, padding="same", groups=2, bias=False),
        (3, 4, 7),
    ),
    "Embedding": (lambda: nn.Embedding(9, 5, padding_idx=0), IDS),
}
OTHERS = list(LAYERS)[-5:]
"""Kinds of layers without a fused forward."""
# What is run, and who computes a DoRA on the output axis: in a Linear or Conv2d, and in others.
TABLE: dict[str, tuple[Any, Any]] = {
    "no scope": (fused_forward, scaled_forward),
    "norm scope": (fused_forward, scaled_forward),
    "run": (None, scaled_forward),  # Past `dora_forward`, with memory for gradients.
    "gain without gradient": (scaled_forward, scaled_forward),
    "base given": (scaled_forward, scaled_forward),
    "output overwritten": (direct_forward, direct_forward),
    "small gain": (direct_forward, direct_forward),
    "compiled": (scaled_forward, scaled_forward),
    "compiled, no scope": (direct_forward, direct_forward),
    "rows": (scaled_forward, scaled_forward),
    "rows of a pack": (scaled_forward, scaled_forward),
}
AXES: dict[str, dict[str, Any]] = {
    "output": {},
    "input": {"norm_axis": "input"},
    "lora": {"use_dora": False},
}
FORMATS = ("contiguous", "gradient", "input", "input and gradient")
"""Names of tensors that are transposed; images are then in channels-last format."""
ROWS = [1, 0, 0]


OF_ANY_DTYPE = ["norm scope", "run", "output overwritten", "compiled", "compiled, no scope"]


def exists(kind: str, way: str) -> bool:
    if way == "rows of a pack" and kind in OTHERS and kind != "Conv1d":
        return False  # Refused by `AdapterStack`.
    return "rows" not in way or LAYERS[kind][1][0] == len(ROWS)


def in_format(tensor: Tensor, is_transposed: bool) -> Tensor:
    if not is_transposed or tensor.ndim == 1:
        return tensor
    if tensor.ndim == 4:
        # As a sequence of pixels that is viewed as an image.
        pixels = tensor.flatten(2).transpose(1, 2).contiguous()
        return pixels.transpose(1, 2).view(tensor.shape)
    return tensor.transpose(1, -1).contiguous().transpose(1, -1)


def layer_of(
    kind: str, way: str, axis: str, dtype: torch.dtype = torch.float64, by: float = 0.3
) -> nn.Module:
    """An adapted layer whose parameters have moved."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind][0]()).to(dtype).requires_grad_(False)
    is_one = "rows" not in way and way != "base given"
    for number in range(1 if is_one else 2):
        config = AdapterConfig(targets=("*",), rank=2 + number, conv_rank=3, alpha=5, **AXES[axis])
        inject_adapters(model, config, name=str(number))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = parameter.data.to(dtype if dtype.itemsize > 2 else torch.float32)
        parameter.data += by * noise
    layer: Any = model[0]
    first = layer.adapters["0"]
    layer.keep_output = way != "output overwritten"
    if way == "small gain" and first.magnitude is not None:
        first.magnitude.data[0], first.magnitude.data[-1] = 0, 1e-9
    if way == "base given":
        first.strengths = Strengths(0.3, 0.7)
    return model


def operands(kind: str, memory: str = "contiguous", dtype: torch.dtype = torch.float64) -> Any:
    """An input, and a function that gives an output the gradient to propagate."""
    shape, generator = LAYERS[kind][1], torch.Generator().manual_seed(2)

    def upstream(y: Tensor) -> Tensor:
        up = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return in_format(up, "gradient" in memory).to(dtype)

    if shape == IDS:
        return torch.randint(9, shape, generator=generator), upstream
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return in_format(x, "input" in memory).to(dtype).requires_grad_(), upstream


def by_the_formula(kind: str, model: Any, way: str, x: Tensor, upstream: Any) -> list[Any]:
    """Output and gradients of the plain layer with `adapted_weight`, by autograd in float64."""
    model = model.double()
    layer, bare = model[0], LAYERS[kind][0]()
    if x.is_floating_point():
        x = x.detach().double().requires_grad_()

    def weight(adapter: Any) -> Tensor:
        s, dense = adapter.strengths, layer.dense().detach()
        settings = {"direction_strength": s.direction_strength, "strength": s.strength}
        return adapted_weight(dense, adapter.weights(), **settings) - dense

    def output(x: Tensor, *adapters: Any) -> Tensor:
        merged = sum(map(weight, adapters), layer.dense().detach())
        state = {"weight": out_in(merged, layer.kind), "bias": getattr(layer, "bias", None)}
        y: Tensor = functional_call(bare, {k: v for k, v in state.items() if v is not None}, x)
        return y

    adapters = list(layer.adapters.values())
    if "rows" in way:
        y = torch.cat([output(x[row, None], adapters[k]) for row, k in enumerate(ROWS)])
    else:
        y = output(x, *adapters)
    leaves = [x] * x.requires_grad + list(adapter_parameters(model))
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream(y).double())]


@contextmanager
def opened(way: str, model: nn.Module) -> Iterator[None]:
    """The scope in which a layer is called; compiled as far as the code can see."""
    ((_, layer),) = adapted_layers(model)
    adapters = list(layer.adapters.values())
    with ExitStack() as stack:
        if way in ("run", "rows of a pack"):
            pack = AdapterStack([layer], [adapters])
            for step in range(2):  # The second step has the memory of the first.
                stack.enter_context(pack.scope())
                stack.enter_context(pack.of(0 if way == "run" else ROWS))
                if not step:
                    stack.close()
        elif way == "rows":
            stack.enter_context(row_scope(model, rows=[str(k) for k in ROWS]))
        elif "no scope" not in way:
            cache = FixedNorms() if way == "gain without gradient" else None
            stack.enter_context(norm_scope(model, cache=cache))
        if way == "compiled":
            layer.route.prepare()
        if "compiled" in way:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


def computed(way: str, model: nn.Module, x: Tensor, upstream: Any) -> list[Any]:
    """Output and gradients in the scope."""
    parameters = list(adapter_parameters(model))
    for leaf in (x, *parameters):
        leaf.grad = None
    with opened(way, model):
        y = model(x)
        if y.requires_grad:
            y.backward(upstream(y))
    leaves = [x] * x.requires_grad + parameters
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    ("kind", "way"), [pair for pair in itertools.product(LAYERS, TABLE) if exists(*pair)]
)
def test_who_computes_a_layer_and_that_it_is_the_formula(
    kind: str, way: str, axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the table says, in all memory formats in which it is trained."""
    chosen: set[Any] = set()
    choose = dora.forward_of
    monkeypatch.setattr(dora, "forward_of", lambda *a: chosen.add(f := choose(*a)) or f)
    model, is_fixed = layer_of(kind, way, axis), way == "gain without gradient" and axis != "lora"
    count = 1 if way not in ("norm scope", "run") else 2 if kind == "Conv1D" else 4
    for memory in FORMATS[:count]:  # Transformers' Conv1D refuses an input that is transposed.
        x, upstream = operands(kind, memory)
        y, *gradients = computed(way, model, x, upstream)
        wanted, *wanted_gradients = by_the_formula(kind, model, way, x, upstream)
        torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-11)
        assert y.stride() == wanted.stride()
        for ours, theirs in itertools.zip_longest(gradients, wanted_gradients):
            if ours is None:
                assert is_fixed
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    expected = {"lora": lora_forward, "input": input_forward}.get(axis, TABLE[way][kind in OTHERS])
    if axis == "lora" and way == "base given":
        expected = None  # Only its difference is computed.
    elif axis == "output" and (kind, way) == ("Conv2d, reflected", "run"):
        expected = fused_forward  # Its input is padded first.
    assert chosen == {expected} - {None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("way", OF_ANY_DTYPE)
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Conv2d of one image", "Conv2d of one pixel"])
def test_sums_are_exact_in_16_bits(kind: str, way: str, axis: str, dtype: torch.dtype) -> None:
    """The magnitude's sum has the error of its inputs; that of rounded products is larger.

    And no gradient is the garbage that oneDNN leaves for taps that only meet padding.
    """
    model, (x, upstream) = layer_of(kind, way, axis, dtype), operands(kind, dtype=dtype)
    with OneDNN():
        y, *gradients = computed(way, model, x, upstream)
    wanted, *wanted_gradients = by_the_formula(kind, model, way, x, upstream)
    step = torch.finfo(dtype).eps
    assert (y.double() - wanted).norm() <= 3 * step * wanted.norm()
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        assert (ours.double() - theirs).norm() <= 4 * step * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("way", OF_ANY_DTYPE)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_fresh_adapter_changes_no_bit(kind: str, way: str, axis: str, dtype: torch.dtype) -> None:
    model, (x, _) = layer_of(kind, way, axis, dtype, by=0), operands(kind, dtype=dtype)
    with disabled(model):
        base = model(x)
    with opened(way, model):
        assert torch.equal(model(x), base)
    assert base.dtype == dtype
    assert {parameter.dtype for parameter in adapter_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("way", [*OF_ANY_DTYPE, "small gain"])
@pytest.mark.parametrize("kind", ["Linear", "Linear of one vector", "Conv2d", "Conv2d, strided"])
def test_the_magnitude_gradient_of_float16_does_not_overflow(
    kind: str, way: str, axis: str
) -> None:
    """Under a loss scale: each product with an output is beyond float16, and no gradient is."""
    model, (x, upstream) = layer_of(kind, way, axis, torch.float16), operands(kind)
    x = (60 * x).half().detach().requires_grad_()

    def scaled(y: Tensor) -> Tensor:
        return (2000 * upstream(y)).half()

    y, *_, found = computed(way, model, x, scaled)
    assert found.dtype == torch.float32
    *_, expected = by_the_formula(kind, model, way, x, scaled)
    assert (y.float().abs().max() * scaled(y).float().abs().max()).item() > 65504
    limit = 5e-3 * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=limit)


def test_adapters_have_inputs_and_strengths_of_their_own() -> None:
    weight, down, up, x = (torch.randn(s, dtype=torch.float64) for s in ((5, 7), (2, 7), (5, 2), 7))
    layer, bias = LayerWeights(down, up, 1.5 * weight_norm(weight, "output"), 3.0), x[:5]
    factors = factors_of(weight, bias, layer, x.dtype, 0.4)
    change = adapted_weight(weight, layer, magnitude_strength=0.4) - weight
    y = sum_of_adapters(Operation(), x, weight, bias, [(factors, 0.3, x), (factors, 1.0, 2 * x)])
    wanted = (weight + 0.3 * change) @ x + bias + change @ (2 * x)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
