"""Inputs that are recomputed in the backward pass, and those that must not be."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters, remove_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.adapters.sources import noted_source, watch_sources
from dora_diffusion.config import AdapterConfig
from tests.adapters.helpers import (
    AXES,
    block,
    fast_only,
    gradients,
    kept_by,
)


class Written(nn.Module):
    """Writes into what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return x


def norm_with(change: str) -> nn.Module:
    """A norm whose output becomes something else before a layer sees it."""
    norm = nn.GroupNorm(2, 8)
    if change == "hook that replaces":
        norm.register_forward_hook(lambda module, args, output: 2 * output)
    elif change == "hook that writes":
        norm.register_forward_hook(lambda module, args, output: output.mul_(2))
    elif change == "wrapped forward":
        plain = norm.forward
        norm.forward = lambda x: 2 * plain(x)
    return norm


CHANGES = {
    "none": nn.Identity,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "SiLU in place": lambda: nn.SiLU(inplace=True),
    "sum in place": Written,
    "hook that replaces": nn.Identity,
    "hook that writes": nn.Identity,
    "wrapped forward": nn.Identity,
}


def dense_gradients(model: nn.Sequential, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of A, B, m and x in float64, from the definition with the norm detached."""
    x = x.double().requires_grad_()
    ((_, layer),) = adapted_layers(model)
    one = layer.adapters["default"]
    down, up, m = (t.detach().double().requires_grad_() for t in (one.down, one.up, one.magnitude))
    weight = layer.weight.double() + one.weights().scale * (
        up.flatten(1) @ down.flatten(1)
    ).view_as(layer.weight)
    dims, view = (
        ((1, 2, 3), (-1, 1, 1, 1)) if one.norm_axis == "output" else ((0, 2, 3), (-1, 1, 1))
    )
    norm = weight.detach().square().sum(dims).sqrt()
    weight = (m / norm).view(view) * weight
    hidden = model[1](model[0].double()(x))
    F.conv2d(hidden, weight, layer.bias.double(), padding=1).square().sum().backward()
    return {"down": down.grad, "up": up.grad, "magnitude": m.grad, "x": x.grad}


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_output_of_a_norm_is_not_recomputed(change, axis):
    torch.manual_seed(0)
    model = nn.Sequential(norm_with(change), CHANGES[change](), nn.Conv2d(8, 8, 3, padding=1))
    config = AdapterConfig(targets=("2",), rank=2, conv_rank=2, norm_axis=axis)
    inject_adapters(model, config)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, 8, 5, 5)
    expected = dense_gradients(model, x)
    model.float()
    given = x.clone().requires_grad_()
    model(given).square().sum().backward()
    ((_, layer),) = adapted_layers(model)
    found = {name: p.grad for name, p in layer.adapters["default"].named_parameters()}
    for name, gradient in (found | {"x": given.grad}).items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(
            gradient.double() / scale, expected[name] / scale, rtol=0, atol=1e-5
        )


def test_a_noted_tensor_can_be_saved(tmp_path):
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    inject_adapters(model, AdapterConfig(targets=("1",), rank=2))
    hidden = model[0](torch.randn(3, 4, requires_grad=True))
    torch.save(hidden, tmp_path / "hidden.pt")
    assert torch.equal(torch.load(tmp_path / "hidden.pt", weights_only=False), hidden)
    assert copy.deepcopy(model)(torch.randn(3, 4)).shape == (3, 4)


# CUDA's autocast runs norms in float32 whatever their parameters are; a CPU's leaves them alone.
AS_ON_CUDA = """
    import torch
    from torch import nn
    from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
    from dora_diffusion.adapters.sources import unwatch_sources
    from dora_diffusion.config import AdapterConfig

    library = torch.library.Library("aten", "IMPL")
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def in_float32(name, operation):
        def run(*args):
            with torch._C._ExcludeDispatchKeyGuard(autocast):
                return operation(*(a.float() if isinstance(a, torch.Tensor) else a for a in args))
        library.impl(name, run, "AutocastCPU")

    in_float32("layer_norm", torch.layer_norm)
    in_float32("group_norm", torch.group_norm)

    def gradients(make, x, watched):
        torch.manual_seed(0)
        model = make().to(torch.bfloat16)
        inject_adapters(model, AdapterConfig(targets=("full",), rank=2, conv_rank=2))
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                parameter.add_(0.2 * torch.randn_like(parameter))
        if not watched:
            unwatch_sources(model)
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            assert model[0](x).dtype == torch.float32
            loss = model(x).float().square().sum()
        loss.backward()
        return [x.grad, *(p.grad for p in adapter_parameters(model))]

    tokens = lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    pictures = lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1))
    plain = lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1))
    for make, shape in ((tokens, (2, 5, 8)), (pictures, (2, 8, 5, 5)), (plain, (2, 8, 5, 5))):
        x = torch.randn(shape)
        kept, recomputed = (gradients(make, x.bfloat16(), watched) for watched in (False, True))
        assert all(torch.equal(*pair) for pair in zip(kept, recomputed, strict=True))
    print("same")
"""


def test_half_precision_norms_under_autocast_as_on_cuda():
    code = textwrap.dedent(AS_ON_CUDA)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.stdout == "same\n", done.stderr[-2000:]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("times", [1, 2])
def test_recomputed_inputs_give_the_same_gradients(axis, dtype, times):
    x = torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        kept, recomputed = (gradients(block(axis, watched), x, times) for watched in (False, True))
    for one, other in zip(kept, recomputed, strict=True):
        assert torch.equal(one, other)


@fast_only(reason="plain autograd keeps inputs")
def test_recomputed_inputs_are_not_kept():
    x = torch.randn(2, 8, 40, 40, requires_grad=True)
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda module, args, output: seen.update({name: output.detach()})

    for watched in (False, True):
        model = block("output", watched)
        for name in ("act", "layer_norm"):
            getattr(model, name).register_forward_hook(keep(name))
        with norm_scope(model):
            y, kept = kept_by(model, x, model)
        assert [one.data_ptr() in kept for one in seen.values()] == [not watched] * 2
        del y


def test_an_input_is_recomputed_by_its_own_module():
    """A parameter that trains could change before the backward pass; a subclass could differ."""

    class Twice(nn.SiLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    x = torch.randn(2, 8, 5, 5)
    results = []
    for watched in (True, False):
        model = block("output", watched)
        model.act = Twice()
        if watched:
            watch_sources(model)
        model.layer_norm.requires_grad_(True)
        results.append([*gradients(model, x), model.layer_norm.weight.grad])
        assert noted_source(model.layer_norm(x.flatten(2).mT.requires_grad_())) is None
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@fast_only(reason="the page hooks no module")
def test_taking_adapters_off_leaves_no_hooks():
    model = block("output", True)
    assert model.act._forward_hooks
    remove_adapters(model)
    assert not any(module._forward_hooks for module in model.modules())
