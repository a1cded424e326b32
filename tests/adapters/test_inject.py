"""Adapters on live modules: exact against PEFT, merged, removed, scoped, compiled."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from dora_diffusion.adapters.inject import (
    adapter_parameters,
    attach_adapters,
    inject_adapters,
    merge_adapters,
    set_strength,
    unmerge_adapters,
)
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.adapters.state import adapter_state
from dora_diffusion.adapters.targets import TargetError, match_targets
from dora_diffusion.config import AdapterConfig
from dora_diffusion.numerics.dora import adapted_weight
from dora_diffusion.numerics.quantised import QUANTISATIONS, quantise
from tests.adapters.helpers import (
    AXES,
    Net,
    everything,
    move,
)


def test_the_report_counts_parameters_as_the_paper_does(net):
    report = inject_adapters(net, AdapterConfig(targets=("square", "conv"), rank=3, conv_rank=2))
    by_path = {layer.path: layer for layer in report.layers}
    assert by_path["square"].parameters == 3 * (10 + 10) + 10
    assert by_path["conv"].parameters == 2 * (27 + 8) + 8
    assert report.parameters == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert str(report) == "2 layers adapted (1 Linear, 1 Conv2d), 148 parameters"


def peft_twin(net: nn.Module, ours: nn.Module, **settings: Any) -> nn.Module:
    """The same adapter in PEFT."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [path for path, _ in adapted_layers(ours)]
    settings = {"r": 3, "lora_alpha": 5.0, **settings}
    twin = inject_adapter_in_model(
        LoraConfig(use_dora=True, target_modules=names, **settings), copy.deepcopy(net)
    )
    with torch.no_grad():
        for path, layer in adapted_layers(ours):
            theirs, adapter = twin.get_submodule(path), layer.adapters["default"]
            theirs.lora_A["default"].weight.copy_(adapter.down)
            theirs.lora_B["default"].weight.copy_(adapter.up)
            magnitude = theirs.lora_magnitude_vector["default"].weight
            magnitude.copy_(adapter.magnitude.view_as(magnitude))
    return twin


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_by_pattern_are_pefts(net, x, rslora):
    pattern = {
        "rank_pattern": {"square": 5, "point": 2},
        "alpha_pattern": {"wide": 7.0, "square": 2.0},
    }
    ours = copy.deepcopy(net)
    config = AdapterConfig(("full",), rank=3, alpha=4.0, conv_alpha=4.0, rslora=rslora, **pattern)
    inject_adapters(ours, config)
    move(ours)
    twin = peft_twin(net, ours, lora_alpha=4.0, use_rslora=rslora, **pattern)
    for path, layer in adapted_layers(ours):
        scale = twin.get_submodule(path).scaling["default"]
        assert layer.adapters["default"].weights().scale == pytest.approx(scale)
    y = twin(x)
    torch.testing.assert_close(ours(x), y, rtol=0, atol=1e-6 * y.abs().max().item())


def test_outputs_gradients_and_merge_agree_with_peft(net, x):
    ours = copy.deepcopy(net)
    inject_adapters(ours, everything())
    move(ours)
    twin = peft_twin(net, ours)
    y, theirs = ours(x), twin(x)
    torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(upstream)
    theirs.backward(upstream)
    for path, layer in adapted_layers(ours):
        adapter, other = layer.adapters["default"], twin.get_submodule(path)
        for mine, their in (
            (adapter.down, other.lora_A["default"].weight),
            (adapter.up, other.lora_B["default"].weight),
            (adapter.magnitude, other.lora_magnitude_vector["default"].weight),
        ):
            scale = their.grad.abs().max().item()
            torch.testing.assert_close(
                mine.grad, their.grad.view_as(mine), rtol=1e-4, atol=1e-5 * scale
            )
    for path, layer in adapted_layers(ours):
        other = twin.get_submodule(path)
        other.merge()
        torch.testing.assert_close(layer.merged(), other.base_layer.weight, rtol=1e-5, atol=1e-5)


def test_dropout_agrees_with_peft(x):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6, bias=False))
    ours = copy.deepcopy(net)
    inject_adapters(ours, everything(dropout=0.4))
    move(ours)
    twin = peft_twin(net, ours, lora_dropout=0.4)
    x = torch.randn(50, 8)
    torch.manual_seed(7)
    mine = ours(x)
    torch.manual_seed(7)
    torch.testing.assert_close(mine, twin(x), rtol=1e-5, atol=1e-5)
    ours.eval(), twin.eval()
    torch.testing.assert_close(ours(x), twin(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mine, ours(x))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    "knobs",
    [
        {"strength": 0.3},
        {"strength": 1.6},
        {"direction": 0.5},
        {"magnitude": 0.0},
        {"strength": 0.7, "direction": 1.3, "magnitude": 0.4},
    ],
)
def test_the_knobs_mean_the_same_in_forward_and_merge(net, x, axis, knobs):
    inject_adapters(net, everything(norm_axis=axis))
    move(net)
    set_strength(net, **knobs)
    y = net(x)
    layer = net.square
    expected = adapted_weight(
        layer.weight,
        layer.adapters["default"].weights(),
        strength=knobs.get("strength", 1.0),
        direction_strength=knobs.get("direction", 1.0),
        magnitude_strength=knobs.get("magnitude", 1.0),
    )
    torch.testing.assert_close(layer.merged(), expected)
    merge_adapters(net)
    torch.testing.assert_close(net(x), y, rtol=1e-5, atol=1e-5)


def test_several_adapters_are_order_free_and_merge_as_they_run(net, x):
    weights = {}
    for seed, axis in enumerate(AXES):
        one = copy.deepcopy(net)
        inject_adapters(one, everything(norm_axis=axis))
        move(one, seed)
        weights[axis] = {
            path.removeprefix("unet."): layer
            for path, layer in adapter_state({"unet": one}).items()
        }
    results = []
    for order in (AXES, AXES[::-1]):
        both = copy.deepcopy(net)
        for axis in order:
            attach_adapters(both, weights[axis], name=axis)
        results.append(both(x))
        merged = {path: layer.merged() for path, layer in adapted_layers(both)}
        merge_adapters(both)
        torch.testing.assert_close(both(x), results[-1], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    weight = net.square.weight
    expected = weight + sum(adapted_weight(weight, weights[a]["square"]) - weight for a in AXES)
    torch.testing.assert_close(merged["square"], expected)


def test_norms_are_computed_once_in_a_scope_and_never_survive_it(net, x, monkeypatch):
    from dora_diffusion.adapters import plan

    inject_adapters(net, everything())
    move(net)
    calls = []
    real = plan.norm_terms
    monkeypatch.setattr(plan, "norm_terms", lambda *given: calls.extend(given[0]) or real(*given))
    with norm_scope(net):
        first = net(x)
        assert torch.equal(net(x), first)
        net(x).sum().backward()
    assert len(calls) == 5
    # Version counters do not see writes through .data: only the end of the scope protects.
    for parameter in adapter_parameters(net):
        parameter.data.add_(0.1)
    fresh = copy.deepcopy(net)
    with norm_scope(net):
        assert torch.equal(net(x), fresh(x))
    assert not torch.allclose(net(x), first)


def test_a_reloaded_base_is_not_served_an_old_norm(net, x):
    inject_adapters(net, everything())
    move(net)
    net(x)
    other = Net()
    inject_adapters(other, everything())
    other.load_state_dict(net.state_dict())
    doubled = {k: v * 2 if "adapters" not in k else v for k, v in net.state_dict().items()}
    net.load_state_dict(doubled)
    other.load_state_dict(doubled)
    assert torch.equal(net(x), other(x))


@pytest.mark.parametrize("axis", AXES)
def test_autocast_stays_near_float32_and_keeps_float32_gradients(net, x, axis):
    inject_adapters(net, everything(norm_axis=axis))
    move(net, by=0.05)
    net(x).sum().backward()
    exact = [p.grad.clone() for p in adapter_parameters(net)]
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    for parameter, expected in zip(adapter_parameters(net), exact, strict=True):
        assert parameter.grad.dtype == torch.float32
        scale = expected.abs().max().item()
        torch.testing.assert_close(parameter.grad, expected, rtol=0.1, atol=0.05 * scale)


def test_an_in_place_activation_after_the_layer_is_safe():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3))
    plain = copy.deepcopy(net)
    plain[1] = nn.ReLU()
    for model in (net, plain):
        inject_adapters(model, everything(), generator=torch.Generator().manual_seed(0))
        move(model)
        model(torch.ones(1, 3, 8, 8)).sum().backward()
    for mine, expected in zip(adapter_parameters(net), adapter_parameters(plain), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)


def test_attention_projections_are_not_adapted():
    """`nn.MultiheadAttention` reads their weights past their forward."""
    net = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TargetError):
        match_targets(net, ["full"])


def test_a_layer_whose_forward_is_wrapped_is_refused(net):
    """As Accelerate's offloading does it: the wrapper would go past the adapter."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(net.square, ModelHook())
    with pytest.raises(TargetError, match="square cannot be adapted: another tool has wrapped"):
        inject_adapters(net, everything())
    twin = Net()
    inject_adapters(twin, everything())
    weights = {"square": twin.square.adapters["default"].weights()}
    with pytest.raises(ValueError, match="square is a Linear whose forward another tool"):
        attach_adapters(net, weights, name="default")
    inject_adapters(net, AdapterConfig(targets=("wide",), rank=2))
    assert [path for path, _ in adapted_layers(net)] == ["wide"]


def test_a_layer_with_two_names_is_adapted_under_both():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    model, x = Tied(), torch.randn(3, 8)
    linear, calls = model.first, []
    hook = linear.register_forward_hook(lambda module, args, output: calls.append(module))
    inject_adapters(model, everything())
    move(model)
    adapted = model(x)
    assert model.first is model.second is linear
    assert calls == [linear, linear]
    merge_adapters(model)
    torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-5)
    hook.remove()
    model(x)
    assert len(calls) == 4, "a handle from before still takes its hook off"
    assert type(linear) is nn.Linear
    assert set(vars(linear)) == set(vars(nn.Linear(8, 8)))


def test_a_scope_that_fails_to_open_leaves_nothing_behind(net, x, monkeypatch):
    inject_adapters(net, everything())

    def fail(inputs):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr("dora_diffusion.adapters.scope.scales_of", fail)
        with pytest.raises(torch.OutOfMemoryError), norm_scope(net):
            pass
    before = net(x)
    move(net)
    after = net(x)
    assert not torch.allclose(before, after)
    merge_adapters(net)
    torch.testing.assert_close(net(x), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", AXES)
def test_a_float64_model_is_adapted_in_float64(net, x, axis):
    net.double()
    inject_adapters(net, everything(norm_axis=axis))
    move(net)
    adapted = net(x.double())
    assert adapted.dtype == torch.float64
    adapted.square().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in adapter_parameters(net))
    merge_adapters(net)
    # The adapter itself is float32.
    torch.testing.assert_close(net(x.double()), adapted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("axis", AXES)
def test_convolutions_take_one_image_and_none(net, x, axis):
    inject_adapters(net, everything(norm_axis=axis))
    move(net)
    convs = nn.Sequential(net.conv, net.down, net.point)
    torch.testing.assert_close(convs(x[0]), convs(x)[0])
    for norms in (nullcontext(), norm_scope(convs)):
        with norms:
            nothing = x[:0].clone().requires_grad_()
            convs(nothing).sum().backward()
    assert nothing.grad.shape == nothing.shape
    assert all(not p.grad.any() for p in adapter_parameters(convs))


def test_an_unfrozen_base_weight_is_an_error(net, x):
    inject_adapters(net, everything())
    net.square.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="freeze it"):
        net(x)


@pytest.mark.parametrize("threads", [1, 3])
def test_merging_twice_and_in_inference_mode(net, x, threads):
    """Only in that mode may its weights be written to, and workers are not in it."""
    with torch.inference_mode():
        net = copy.deepcopy(net)
        inject_adapters(net, everything())
        move(net)
        base, adapted = net.square.weight.clone(), net(x)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            merge_adapters(net, keep_base=True)
            merged = net.square.weight.clone()
            merge_adapters(net, keep_base=True)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        assert torch.equal(net.square.weight, merged)
        torch.testing.assert_close(net(x), adapted, rtol=1e-5, atol=1e-5)
        unmerge_adapters(net)
        assert torch.equal(net.square.weight, base)


def test_layers_that_share_a_weight_merge_one_after_the_other(monkeypatch):
    def all_at_once(make, items):
        return [(item, make(item)) for item in items]

    monkeypatch.setattr("dora_diffusion.adapters.inject.map_ahead", all_at_once)
    first, second = (nn.Linear(256, 256, bias=False) for _ in range(2))
    second.weight = first.weight
    model = nn.Sequential(first, second)
    inject_adapters(model, everything())
    move(model)
    expected = first.weight
    for layer in model:
        expected = adapted_weight(expected, layer.adapters["default"].weights())
    merge_adapters(model)
    torch.testing.assert_close(first.weight, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_a_quantised_base_agrees_with_peft_on_bitsandbytes(kind):
    """On a weight that the codes of both represent; in training, where theirs stay as they are."""
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    ours, layers = nn.Sequential(nn.Linear(128, 96)), library.nn
    packed = quantise(ours[0].weight, kind)
    values = {"weight": packed.dense(), "bias": ours[0].bias.detach()}
    if kind == "nf4":
        other = layers.Linear4bit(128, 96, torch.float32, compress_statistics=False)
        other.weight = layers.Params4bit(
            values["weight"], quant_type="nf4", compress_statistics=False, module=other
        )
        other.bias = nn.Parameter(values["bias"])
    else:
        other = layers.Linear8bitLt(128, 96, has_fp16_weights=False)
        other.load_state_dict(values)
    net = nn.Sequential(other.to("cpu"))
    if kind == "int8":
        net[0].weight.SCB = 127 * packed.scale  # theirs is of the weight in float16
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    assert torch.equal(net[0].weight.data.view(-1), packed.codes.view(-1))

    ours[0].weight = nn.Parameter(packed, requires_grad=False)
    inject_adapters(ours, AdapterConfig(("0",), rank=3, alpha=5.0))
    move(ours)
    twin = peft_twin(net, ours).train()
    mine, theirs = ours[0].adapters["default"], twin[0]
    x, upstream = torch.randn(5, 7, 128), torch.randn(5, 7, 96)
    own, same = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = ours(own), twin(same)
    y.backward(upstream)
    wanted.backward(upstream)
    magnitude = theirs.lora_magnitude_vector["default"].weight.grad
    for found, expected in (
        (y, wanted),
        (own.grad, same.grad),
        (mine.down.grad, theirs.lora_A["default"].weight.grad),
        (mine.up.grad, theirs.lora_B["default"].weight.grad),
        (mine.magnitude.grad, magnitude.view_as(mine.magnitude)),
    ):
        assert (found - expected).norm() <= 1e-6 * expected.norm()
