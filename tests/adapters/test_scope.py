"""A loop keeps what it found out, and notices whatever changes between its steps."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_diffusion.adapters import layers
from dora_diffusion.adapters.inject import (
    adapter_parameters,
    disabled,
    inject_adapters,
    merge_adapters,
    remove_adapters,
    set_strength,
    unmerge_adapters,
)
from dora_diffusion.adapters.layers import AdaptedLayer, adapted_layers
from dora_diffusion.adapters.scope import NormCache, norm_scope
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
    merge_adapters(net, keep_base=True)
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
    cache = NormCache()
    for number in range(3):
        if number == 1:
            CHANGES[change](net)
            x = x.to(next(net.parameters()).dtype)
        with norm_scope(net, cache=cache):
            found = net(x)
        with norm_scope(net):
            expected = net(x)
        assert torch.equal(found, expected), number


def test_what_did_not_change_is_found_out_once(net, x, monkeypatch):
    inject_adapters(net, everything())
    move(net)
    calls = []
    real = layers.layouts_of
    monkeypatch.setattr(layers, "layouts_of", lambda inputs: calls.append(1) or real(inputs))
    cache = NormCache()
    for expected in (1, 1, 2, 3, 3):
        if expected == 2:
            net.square.adapters["default"].enabled = False
        elif len(calls) == 2:
            net.square.adapters["default"].enabled = True
        with norm_scope(net, cache=cache):
            net(x)
        write_adapter(net)
        assert len(calls) == expected


def test_a_layer_whose_output_is_overwritten_now_is_noticed(net, x):
    inject_adapters(net, everything())
    cache = NormCache()
    for kept in (True, False):
        net.square.keep_output = kept
        with norm_scope(net, cache=cache):
            scales = net.square.scales("default", net.square.adapters["default"])
            assert scales.factors(torch.float32).gain_in_graph != kept


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


class PastCounters(torch.optim.SGD):
    """Writes through ``.data``, as Prodigy does: no version counter sees it."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(group["lr"] * parameter.grad)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "past counters": lambda parameters: PastCounters(parameters, lr=0.1),
}
MISTAKE = r"changed inside norm_scope.*one norm_scope for each optimizer step.*parameters after it"


def train_inside(
    scope: Any, net: nn.Module, x: Tensor, update: torch.optim.Optimizer
) -> Iterator[Tensor]:
    """Steps inside of one scope: the loss of each."""
    with scope:
        for _ in range(3):
            loss = net(x).square().mean()
            loss.backward()
            update.step()
            update.zero_grad()
            yield loss.detach()


@pytest.mark.parametrize(
    "settings", [{}, {"parametrization": "vera"}, {"parametrization": "adalora"}]
)
@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_loop_of_steps_inside_one_scope_is_an_error(net, x, optimizer, looped, settings):
    """Its second step would train on the norms and factors of the first one's parameters."""
    inject_adapters(net, everything(**settings))
    move(net)
    update = OPTIMIZERS[optimizer](list(adapter_parameters(net)))
    steps = train_inside(norm_scope(net, cache=NormCache() if looped else None), net, x, update)
    next(steps)
    with pytest.raises(RuntimeError, match=MISTAKE):
        next(steps)
    with norm_scope(net):
        inside = net(x)
    torch.testing.assert_close(inside, net(x))


CHANGES_INSIDE: dict[str, Callable[[Any], Any]] = {
    "written": write_adapter,
    "A replaced": replace("down"),
    "m replaced": replace("magnitude"),
}


@pytest.mark.parametrize("change", CHANGES_INSIDE)
def test_a_parameter_that_is_changed_inside_is_an_error_in_the_layer_that_has_it(net, x, change):
    inject_adapters(net, everything())
    with norm_scope(net):
        net(x)
        CHANGES_INSIDE[change](net)
        net.conv(x)
        with pytest.raises(RuntimeError, match=MISTAKE):
            net.square(torch.ones(1, 10))


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_what_changes_no_parameter_is_no_error(net, x, reentrant):
    """Accumulation, recomputation, an average that follows, and a step that ends the scope."""
    inject_adapters(net, everything())
    inject_adapters(net, everything(rank=2), name="second")
    parameters = list(adapter_parameters(net))
    averages = [p.detach().clone() for p in parameters]
    update = torch.optim.AdamW(parameters, fused=True)
    other = nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    elsewhere = torch.optim.AdamW([other], fused=True)
    x = x.requires_grad_()
    for cache in (None, NormCache(), None):
        with norm_scope(net, cache=cache):
            for _ in range(2):
                y = net(x) if reentrant is None else checkpoint(net, x, use_reentrant=reentrant)
                y.square().mean().backward()
                torch._foreach_lerp_(averages, parameters, 0.1)
                elsewhere.step()
            with torch.no_grad(), disabled(net, name="second"):
                net(x)
            set_strength(net, 0.5)
            net(x)
            set_strength(net, 1.0)
            remove_adapters(net, "second")
            inject_adapters(net, everything(rank=2), name="second")
            net(x)
            update.step()
    assert not torch.equal(averages[0], parameters[0])


def test_adapters_that_were_made_in_inference_mode_have_no_counters(net, x):
    with torch.inference_mode():
        inject_adapters(net, everything())
        move(net)
        with norm_scope(net):
            torch.testing.assert_close(net(x), net(x))


def test_a_lora_has_no_norm_and_may_train_inside_a_scope(net, x):
    """The same losses as without the scope."""
    inject_adapters(net, everything(use_dora=False))
    move(net)
    losses = []
    for model, opened in ((copy.deepcopy(net), nullcontext()), (net, norm_scope(net))):
        update = torch.optim.SGD(list(adapter_parameters(model)), lr=0.1)
        losses.append(torch.stack(list(train_inside(opened, model, x, update))))
    assert torch.equal(*losses)
    assert len(losses[0].unique()) == 3


def test_layers_that_get_their_first_adapter_or_lose_their_last_are_noticed(net, x):
    """By a loop: those of its models now are those that a scope opens."""
    cache = NormCache()
    inject_adapters(net, dataclasses.replace(everything(), targets=("square",)))
    expected = [["square"], ["conv", "square"], ["conv"], ["down"]]
    for number, names in enumerate(expected):
        if number == 1:
            inject_adapters(net, dataclasses.replace(everything(), targets=("conv",)), name="b")
        elif number == 2:
            remove_adapters(net, "default")
        elif number == 3:
            remove_adapters(net)
            inject_adapters(net, dataclasses.replace(everything(), targets=("down",)))
        with norm_scope(net, cache=cache):
            assert [p for p, m in net.named_modules() if getattr(m, "route", None)] == names
            net(x)


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": False}, {"parametrization": "vera"}], ids=str
)
def test_gradients_are_there_inside_of_a_scope_after_each_pass(net, x, settings):
    """For hooks, and whatever else looks at them between two passes."""
    inject_adapters(net, everything(**settings))
    move(net)
    parameters, seen = list(adapter_parameters(net)), []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    with norm_scope(net):
        net(x).square().mean().backward()
        once = [parameter.grad.clone() for parameter in parameters]
        net(x).square().mean().backward()
        twice = [parameter.grad for parameter in parameters]
        torch.testing.assert_close(twice, [2 * gradient for gradient in once])
        layer = net.square
        found = torch.autograd.grad(layer(torch.ones(2, 10)).sum(), parameters, allow_unused=True)
    assert len(seen) == 2 * len(parameters)
    # Of a pass through one layer the others have none, whatever earlier ones have reached.
    reached = {id(parameter) for parameter in layer.adapters.parameters()}
    if "parametrization" not in settings:  # It gives what it makes of no gradient zeros.
        assert [g is not None for g in found] == [id(p) in reached for p in parameters]
