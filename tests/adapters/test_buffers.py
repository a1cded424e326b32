"""Factors and gradients of a run in memory that stays, in the order of the optimizer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_diffusion.adapters.flat import consecutive
from dora_diffusion.adapters.inject import AdapterSet, adapter_parameters, inject_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.adapters.stack import AdapterStack
from dora_diffusion.training.optimizer import FlatParameters
from tests.adapters.helpers import everything, move


class Mixed(nn.Module):
    """Layers that buffers serve, and layers that they do not: grouped, in one dimension, ids."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = nn.Embedding(9, 6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 8, bias=False)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.conv = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(self.ids(ids))))
        x = torch.tanh(self.line(x.mT))[..., None]
        return self.conv(torch.tanh(self.grouped(x)))


IDS = torch.tensor([[1, 2, 3, 4], [8, 7, 0, 0]])


def stacked(model: nn.Module, memory: Any = None) -> AdapterStack:
    layers = [layer for _, layer in adapted_layers(model)]
    return AdapterStack(layers, [[*layer.adapters.values()] for layer in layers], memory)


def by_role(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of A, B and m, as a run has them."""
    adapters = AdapterSet.of(model).trained()
    roles = zip(*(adapter.parameters() for adapter in adapters), strict=True)
    return [{"params": list(role)} for role in roles]


def moved(dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Mixed().to(dtype)
    inject_adapters(model, everything(**{"rank": 2, **settings}))
    move(model, by=0.1)
    return model


def expected(model: nn.Module, times: float = 1) -> list[Tensor]:
    """Gradients of a scope of one's own."""
    with norm_scope(model):
        loss = model(IDS).square().sum() * times
        return list(torch.autograd.grad(loss, list(adapter_parameters(model))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings", [{}, {"conv_rank": 4}, {"rank_pattern": {"second": 3}}], ids=str
)
def test_gradients_lie_in_the_optimizers_memory(dtype: torch.dtype, settings: Any) -> None:
    """Those of every layer, whether buffers serve it or not, over passes of one step."""
    model = moved(dtype, **settings)
    wanted = expected(model, times=3)
    flat = FlatParameters(by_role(model), AdapterSet.of(model).parameters())
    stack = stacked(model, flat.memory)
    for _ in range(2):
        with stack.scope():
            for times in (1, 2):
                with stack.of(0):
                    (model(IDS).square().sum() * times).backward()
        found = [parameter.grad for parameter in adapter_parameters(model)]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        flat.take_gradients()
        for parameter, gradient in zip(adapter_parameters(model), wanted, strict=True):
            torch.testing.assert_close(flat.memory[parameter], gradient, rtol=1e-5, atol=1e-5)
        flat.finish()


def test_a_layer_that_no_pass_reached_has_no_gradient() -> None:
    model = moved()
    flat = FlatParameters(by_role(model), AdapterSet.of(model).parameters())
    stack = stacked(model, flat.memory)
    with stack.scope(), stack.of(0):
        model(IDS).square().sum().backward()
    flat.take_gradients()
    flat.finish()
    with stack.scope(), stack.of(0):
        model.first(torch.ones(3, 6)).square().sum().backward()
    reached = {id(p) for p in model.first.adapters.parameters()}
    for parameter in adapter_parameters(model):
        assert (parameter.grad is not None) == (id(parameter) in reached)
    flat.take_gradients()
    for parameter in adapter_parameters(model):
        assert bool(flat.memory[parameter].any()) == (id(parameter) in reached)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_that_reaches_some_layers_adds_nothing_to_the_others(dtype: torch.dtype) -> None:
    """The memory of a layer has the gradient of the pass before."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)).to(dtype)
    inject_adapters(model, everything(rank=2))
    move(model)
    stack, x = stacked(model), torch.ones(2, 6, dtype=dtype)

    def gradients(*passes: nn.Module) -> list[Tensor]:
        with stack.scope():
            for part in passes:
                with stack.of(0):
                    part(x).square().sum().backward()
        found = [parameter.grad for parameter in adapter_parameters(model)]
        for parameter in adapter_parameters(model):
            parameter.grad = None
        return [torch.zeros(1) if grad is None else grad.clone() for grad in found]

    first, second = gradients(model), gradients(model[1])
    for both, one, other in zip(gradients(model, model[1]), first, second, strict=True):
        torch.testing.assert_close(both, one + other)


def test_a_step_that_failed_leaves_no_gradient_to_the_next() -> None:
    model = moved()
    wanted, stack = expected(model), stacked(model)

    def fail() -> None:
        with stack.scope(), stack.of(0):
            model(IDS).square().sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with stack.scope(), stack.of(0):
        model(IDS).square().sum().backward()
    found = [parameter.grad for parameter in adapter_parameters(model)]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_recomputed_layers_add_nothing() -> None:
    model = moved()
    wanted, stack = expected(model), stacked(model)
    with stack.scope(), stack.of(0):
        checkpoint(model, IDS, use_reentrant=False).square().sum().backward()
    found = [parameter.grad for parameter in adapter_parameters(model)]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_copied_and_nothing_moves_from_step_to_step(dtype: torch.dtype) -> None:
    """Neither a factor nor a gradient: the flat gradient is what backward passes write to."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Conv2d(3, 4, 3), nn.Linear(6, 5)).to(dtype)
    inject_adapters(model, everything(rank=2))
    flat = FlatParameters(by_role(model), AdapterSet.of(model).parameters())
    stack, places = stacked(model, flat.memory), []
    optimizer = torch.optim.AdamW(flat.groups, fused=True)
    for _ in range(3):
        with stack.scope(), stack.of(0):
            forwards = [layer.route.ready[dtype].args for _, layer in adapted_layers(model)]
            y = model[1](torch.ones(2, 3, 5, 5, dtype=dtype)).sum()
            (y + model[2](model[0](torch.ones(2, 6, dtype=dtype))).sum()).backward()
        for parameter in adapter_parameters(model):
            assert parameter.grad is flat.memory[parameter]
        flat.take_gradients()
        tensors = [tensor for fused, _ in forwards for tensor in fused.factors[:4]]
        tensors += [t for fused, _ in forwards for t in (fused.gradients.down, fused.gradients.up)]
        tensors += [*flat, *(p.grad for p in flat), *adapter_parameters(model)]
        optimizer.step()
        places.append([tensor.data_ptr() for tensor in tensors])
        flat.finish()
    assert places[0] == places[1] == places[2]
    assert len(places[0]) > 30


def test_consecutive_tensors_are_one_vector() -> None:
    memory = torch.arange(12.0)
    parts = [memory[1:3], memory[3:9].view(2, 3), memory[9:]]
    vector = consecutive(parts)
    assert vector is not None
    assert torch.equal(vector, memory[1:])
    vector[0] = -1
    assert memory[1] == -1
    assert consecutive([parts[0], parts[2]]) is None
    assert consecutive([parts[1], parts[0]]) is None
    assert consecutive([memory[:2], memory[2:].view(torch.int32)]) is None
    # Neighbours in memory, but the first one's storage ends where the second one's starts.
    raw = bytearray(32)
    first, second = (torch.frombuffer(raw, dtype=torch.float32, count=4, offset=o) for o in (0, 16))
    assert second.data_ptr() == first.data_ptr() + 16
    assert consecutive([first, second]) is None
