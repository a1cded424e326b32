"""A loop keeps what it found out, and notices whatever changes between its steps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dora_diffusion.adapters import scope
from dora_diffusion.adapters.inject import (
    disabled,
    inject_adapters,
    merge_adapters,
    remove_adapters,
    set_strength,
    unmerge_adapters,
)
from dora_diffusion.adapters.layers import AdaptedLayer, adapted_layers
from dora_diffusion.adapters.scope import Loop, norm_scope
from tests.adapters.helpers import Net, everything, gradients, move


def named_modules_order(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(p, m) for p, m in model.named_modules() if isinstance(m, AdaptedLayer)]


def test_adapted_layers_come_in_the_order_of_named_modules_each_once(net):
    model = nn.ModuleDict({"first": net, "again": net, "list": nn.ModuleList([Net(), Net()])})
    model["none"] = nn.Module()
    model["none"].register_module("nothing", None)
    inject_adapters(model, everything())
    found = list(adapted_layers(model))
    assert found == named_modules_order(model)
    assert len(found) == 15


def replace_weight(net: Any) -> None:
    net.square.weight = nn.Parameter(net.square.weight.detach() * 1.5, requires_grad=False)


def write_weight(net: Any) -> None:
    with torch.no_grad():
        net.square.weight.mul_(1.5)


def replace_bias(net: Any) -> None:
    net.square.bias = nn.Parameter(net.square.bias.detach() + 1, requires_grad=False)


def write_adapter(net: Any) -> None:
    adapter = net.square.adapters["default"]
    with torch.no_grad():
        adapter.down.mul_(1.5)
        adapter.magnitude.add_(0.2)


def replace(name: str) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        adapter = net.square.adapters["default"]
        setattr(adapter, name, nn.Parameter(getattr(adapter, name).detach() * 2))

    return change


def other_alpha(net: Any) -> None:
    net.square.adapters["default"].alpha *= 2


def second_adapter(net: Any) -> None:
    inject_adapters(net, everything(rank=2), name="second")
    move(net, seed=3)


def other_axis(net: Any) -> None:
    remove_adapters(net)
    inject_adapters(net, everything(norm_axis="input"))
    move(net, seed=4)


def merge_and_back(net: Any) -> None:
    merge_adapters(net)
    unmerge_adapters(net)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda net: None,
    "base weight replaced": replace_weight,
    "base weight written": write_weight,
    "bias replaced": replace_bias,
    "adapter written": write_adapter,
    "A replaced": replace("down"),
    "B replaced": replace("up"),
    "m replaced": replace("magnitude"),
    "alpha": other_alpha,
    "strength": lambda net: set_strength(net, 0.5),
    "direction's strength": lambda net: set_strength(net, direction=0.5),
    "magnitude's strength": lambda net: set_strength(net, magnitude=0.5),
    "one off": lambda net: setattr(net.square.adapters["default"], "enabled", False),
    "merged": merge_adapters,
    "merged and back": merge_and_back,
    "second adapter": second_adapter,
    "removed": remove_adapters,
    "other axis": other_axis,
    "float64": lambda net: net.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("axis", ["output", "input"])
def test_what_changes_between_two_steps_is_noticed(net, x, axis, change):
    """The same numbers as without a loop, to the last bit, before and after."""
    inject_adapters(net, everything(norm_axis=axis))
    move(net)
    loop = Loop()
    for number in range(3):
        if number == 1:
            CHANGES[change](net)
            x = x.to(next(net.parameters()).dtype)
        with norm_scope(net, loop=loop):
            found = net(x)
        with norm_scope(net):
            expected = net(x)
        assert torch.equal(found, expected), number


def test_another_model_is_another_set_of_layers(net, x):
    other = Net().requires_grad_(False)
    loop = Loop()
    for number, model in enumerate((net, other)):
        inject_adapters(model, everything())
        move(model, seed=number)
    for models in ((net,), (other,), (net,), (net, other), (other, net)):
        with norm_scope(*models, loop=loop):
            assert all(layer._scales_cache for m in models for _, layer in adapted_layers(m))
            found = [model(x) for model in models]
        with norm_scope(*models):
            assert all(map(torch.equal, found, [model(x) for model in models]))


def test_what_did_not_change_is_found_out_once(net, x, monkeypatch):
    inject_adapters(net, everything())
    move(net)
    calls = []
    real = scope.layouts_of
    monkeypatch.setattr(scope, "layouts_of", lambda inputs: calls.append(1) or real(inputs))
    loop = Loop()
    for expected in (1, 1, 2, 3, 3):
        if expected == 2:
            net.square.adapters["default"].enabled = False
        elif len(calls) == 2:
            net.square.adapters["default"].enabled = True
        with norm_scope(net, loop=loop):
            net(x)
        write_adapter(net)
        assert len(calls) == expected


@pytest.mark.parametrize("settings", [{"direction": "vera"}, {}])
def test_what_a_direction_made_is_not_kept_beyond_its_step(net, x, settings):
    """Vectors train; the matrices that they make are large, and of one step."""
    inject_adapters(net, everything(**settings))
    loop = Loop()
    with norm_scope(net, loop=loop):
        net(x)
        scales = net.square.scales("default", net.square.adapters["default"])
        made = weakref.ref(scales.plan.layers[scales.index].weights.down)
    del scales
    gc.collect()
    assert (made() is None) == ("direction" in settings)


def test_a_layer_whose_output_is_overwritten_now_is_noticed(net, x):
    inject_adapters(net, everything())
    loop = Loop()
    for kept in (True, False):
        net.square.keep_output = kept
        with norm_scope(net, loop=loop):
            scales = net.square.scales("default", net.square.adapters["default"])
            assert scales.factors(torch.float32).is_direct != kept


@pytest.mark.parametrize("axis", ["output", "input"])
def test_layers_of_other_scales_and_ranks_lie_in_one_layout(x, axis):
    """Rows of one matrix B that are scaled apart, against gradients of each layer alone."""
    net = nn.Sequential(Net(), nn.Linear(17, 17), nn.Linear(17, 17), nn.Linear(17, 17))
    inject_adapters(net, everything(conv_rank=2, norm_axis=axis))
    move(net)
    for number, (_, layer) in enumerate(adapted_layers(net)):
        layer.adapters["default"].alpha = 1.0 + number
    found = gradients(net, x)
    for _, layer in adapted_layers(net):
        for parameter in layer.adapters.parameters():
            parameter.grad = None
    alone = x.clone().requires_grad_()
    net(alone).square().sum().backward()
    expected = [
        alone.grad,
        *(p.grad for _, layer in adapted_layers(net) for p in layer.adapters.parameters()),
    ]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_loop_can_be_left_by_an_exception(net, x):
    inject_adapters(net, everything())
    loop = Loop()
    with pytest.raises(KeyError), norm_scope(net, loop=loop):
        raise KeyError
    assert all(layer._scales_cache is None for _, layer in adapted_layers(net))
    with norm_scope(net, loop=loop), disabled(net):
        net(x)
