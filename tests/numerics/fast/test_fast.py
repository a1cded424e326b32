"""The fast path is the page: outputs and all gradients, for every layer kind, axis and dtype."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dora_diffusion.numerics import fast
from dora_diffusion.numerics.dora import adapted_norm, dora_forward, weight_norm
from dora_diffusion.numerics.fast import PlanInputs, WeightStatistics, make_gains
from dora_diffusion.numerics.operation import ConvOperation, LinearOperation
from dora_diffusion.numerics.weights import LayerWeights

AXES = ("output", "input")
# kind -> (weight shape, input shape, operation)
KINDS = {
    "linear": ((40, 24), (3, 9, 24), LinearOperation()),
    "linear square": ((24, 24), (2, 24), LinearOperation()),
    "linear, one row": ((17, 24), (24,), LinearOperation()),
    "conv 1x1": ((40, 24, 1, 1), (2, 24, 5, 4), ConvOperation()),
    "conv 1x1 strided": ((12, 24, 1, 1), (2, 24, 5, 4), ConvOperation(stride=(2, 2))),
    "conv 3x3": ((20, 36, 3, 3), (2, 36, 9, 8), ConvOperation(padding=(1, 1))),
    "conv 3x3 unpadded": ((20, 36, 3, 3), (2, 36, 9, 8), ConvOperation()),
    "conv 3x3, one pixel": ((20, 36, 3, 3), (1, 36, 1, 1), ConvOperation(padding=(1, 1))),
    "conv 3x3 strided": ((20, 8, 3, 3), (2, 8, 9, 7), ConvOperation((2, 2), (1, 1))),
    "conv 3x3 dilated": ((20, 36, 3, 3), (1, 36, 9, 9), ConvOperation((1, 1), (2, 2), (2, 2))),
    "conv 3x2": ((8, 12, 3, 2), (2, 12, 11, 9), ConvOperation((2, 1), (1, 2), (1, 2))),
}
# dtype -> largest difference of an output or gradient, as a share of its largest number: for 16
# bits, a few roundings of activations.
DTYPES = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: 4 * 2**-8,
    torch.float16: 4 * 2**-11,
}


def draw(shape, dtype, axis, bias, rank=3):
    """A layer whose magnitude has moved; factors and magnitude are float32 or wider."""
    g = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fan_in = torch.Size(shape[1:]).numel()

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    weight = (normal(*shape) / fan_in**0.5).to(dtype)
    down = (normal(rank, *shape[1:]) / fan_in**0.5).to(wide)
    up = (0.3 * normal(shape[0], rank, *[1] * (len(shape) - 2))).to(wide)
    norm = weight_norm(weight, axis)
    magnitude = (norm * (1 + 0.2 * normal(len(norm)))).to(wide)
    return weight, normal(shape[0]).to(dtype) if bias else None, down, up, magnitude


def run_fast(op, x, weight, bias, layer, **options):
    statistics = WeightStatistics(weight, layer.norm_axis)
    inputs = PlanInputs(layer, layer.magnitude, weight, bias, statistics, **options)
    return fast.dora(op, x, weight, bias, make_gains([inputs])[0])


def results(function, kind, axis, dtype=torch.float64, bias=True):
    """Output, and the gradients of x, A, B and m."""
    shape, input_shape, op = KINDS[kind]
    weight, b, *factors = draw(shape, dtype, axis, bias)
    x = torch.randn(input_shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    leaves = [leaf.clone().requires_grad_() for leaf in (x, *factors)]
    y = function(op, leaves[0], weight, b, LayerWeights(*leaves[1:], 5.0, axis))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def assert_same(found, expected, share):
    for ours, page in zip(found, expected, strict=True):
        assert ours.dtype == page.dtype
        torch.testing.assert_close(ours, page, rtol=0, atol=share * page.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_page(kind, axis, bias, dtype):
    if kind == "conv 3x3, one pixel" and dtype == torch.bfloat16:
        pytest.skip("the library's own gradient is wrong there, see test_operation.py")
    found, expected = (results(one, kind, axis, dtype, bias) for one in (run_fast, dora_forward))
    assert_same(found, expected, DTYPES[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_a_recomputed_output_changes_no_gradient(kind):
    def recomputing(*args):
        return run_fast(*args, keep_output=False)

    found, expected = (results(one, kind, "output") for one in (recomputing, dora_forward))
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_the_pages(kind, axis, enabled, monkeypatch):
    monkeypatch.setattr(fast, "ENABLED", enabled)
    weight, _, *factors = draw(KINDS[kind][0], torch.float64, axis, False)
    layer = LayerWeights(*factors, 5.0, axis)
    expected = adapted_norm(weight, layer)
    torch.testing.assert_close(fast.adapted_norm(weight, layer), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("value", "enabled"), [("", True), ("1", True), ("0", False)])
def test_the_switch(value, enabled):
    assert fast._enabled(value) is enabled


def test_another_value_of_the_switch_is_an_error():
    with pytest.raises(ValueError, match=r"DORA_DIFFUSION_FAST is 'no'; it must be 0 .* or 1"):
        fast._enabled("no")


WITHOUT = """
import torch
from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.config import AdapterConfig
from dora_diffusion.numerics import fast
from dora_diffusion.numerics.dora import dora_forward

def refuse(*args, **kwargs):
    raise AssertionError("the fast path was used")

assert not fast.ENABLED
fast.dora = fast.make_gains = fast.factored_norm = refuse
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 6))
inject_adapters(model, AdapterConfig(targets=("1",), rank=2))
for parameter in adapter_parameters(model):
    parameter.data.add_(0.2 * torch.randn_like(parameter))
layer, x = model[1], torch.randn(3, 8)
with norm_scope(model):
    y = model(x)
    y.sum().backward()
weights = layer.adapters["default"].weights()
page = dora_forward(layer.operation(), model[0](x), layer.weight, layer.bias, weights)
assert torch.equal(y, page)
assert not model[0]._forward_hooks
print("page")
"""


def test_without_it_layers_compute_the_page():
    environment = os.environ | {"DORA_DIFFUSION_FAST": "0"}
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, encoding="utf-8"
    )
    assert done.stdout == "page\n", done.stderr[-2000:]
