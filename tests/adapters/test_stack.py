"""Stacked adapters: outputs and gradients are those of each adapter by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dora_diffusion.adapters.inject import inject_adapters, layer_adapters
from dora_diffusion.adapters.layers import LayerAdapter, adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.adapters.stack import AdapterStack
from dora_diffusion.config import AdapterConfig
from dora_diffusion.numerics.weights import Strengths


def make(ranks: list[int], **settings: object) -> tuple[nn.Module, list[list[LayerAdapter]]]:
    """A model with so many trained adapters, which are returned by number, in float64."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.Flatten(1), nn.Linear(128, 6), nn.GELU(), nn.Linear(6, 6, bias=False),
    ).double()  # fmt: skip
    for k, rank in enumerate(ranks):
        usual = {
            "targets": ("*",),
            "rank": rank,
            "conv_rank": max(1, rank - 1),
            "alpha": 2.0 * rank,
        }
        config = AdapterConfig(**{**usual, **settings})
        inject_adapters(model, config, name=str(k), generator=generator)
    adapters = [list(layer_adapters(model.double(), str(k))) for k in range(len(ranks))]
    with torch.no_grad():
        for parameter in (p for part in adapters for a in part for p in a.parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(parameter * (1 + 0.1 * noise) + 0.05 * noise)
    return model, adapters


def parameters(adapters: list[LayerAdapter]) -> list[nn.Parameter]:
    return [parameter for adapter in adapters for parameter in adapter.parameters()]


def one_by_one(
    model: nn.Module, adapters: list[list[LayerAdapter]], rows: list[int], x: Tensor, up: Tensor
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Each row's output, and each adapter's gradients, with no other adapter switched on."""
    outputs, gradients = torch.empty_like(up), []
    for k, own in enumerate(adapters):
        for number, others in enumerate(adapters):
            for adapter in others:
                adapter.enabled = number == k
        chosen = [row for row, owner in enumerate(rows) if owner == k]
        with norm_scope(model):
            made = model(x[chosen])
            gradients.append(torch.autograd.grad((made * up[chosen]).sum(), parameters(own)))
        outputs[chosen] = made.detach()
    return outputs, gradients


@pytest.mark.parametrize("settings", [{}, {"norm_axis": "input"}, {"use_dora": False}], ids=str)
@pytest.mark.parametrize(
    ("rows", "ranks"),
    [
        ([0, 1, 2], [3, 3, 3]),
        ([2, 1, 0], [3, 3, 3]),
        ([2, 0, 0, 1, 2, 1], [3, 2, 4]),
        ([1, 1, 1], [3, 2, 4]),  # All rows have one.
        ([0, 0, 0], [3]),
    ],
)
@pytest.mark.parametrize("tiny_gain", [False, True])
def test_rows_and_gradients_are_those_of_each_adapter_by_itself(
    settings: dict[str, object], rows: list[int], ranks: list[int], tiny_gain: bool
) -> None:
    model, adapters = make(ranks, **settings)
    if tiny_gain and (own := adapters[rows[1]])[0].magnitude is not None:
        with torch.no_grad():  # Dividing by it would lose the gradient of m.
            own[0].magnitude[0] = 0
            own[2].magnitude[1] = 1e-9
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(rows), 3, 8, 8, generator=generator, dtype=torch.float64)
    up = torch.randn(len(rows), 6, generator=generator, dtype=torch.float64)
    outputs, gradients = one_by_one(model, adapters, rows, x, up)
    layers = [layer for _, layer in adapted_layers(model)]
    stack = AdapterStack(layers, list(zip(*adapters, strict=True)))
    for _ in range(2):  # Gradients start anew, and add up over batches of one step.
        with stack.scope(), stack.of(rows):
            made = model(x)
            (made * up).sum().backward()
            (model(x) * up).sum().backward()
            assert all(parameter.grad is None for own in adapters for parameter in parameters(own))
        found = [[parameter.grad for parameter in parameters(own)] for own in adapters]
        for own in adapters:
            for parameter in parameters(own):
                parameter.grad = None
    torch.testing.assert_close(made, outputs, rtol=0, atol=1e-12)
    for ours, wanted in zip(found, gradients, strict=True):
        doubled = [2 * gradient for gradient in wanted]
        torch.testing.assert_close(ours, doubled, rtol=1e-9, atol=1e-9)
    with stack.scope():
        base = model(x)
    for adapter in (a for own in adapters for a in own):
        adapter.enabled = False
    torch.testing.assert_close(base, model(x), rtol=0, atol=0)


def stacked(model: nn.Module, adapters: list[list[LayerAdapter]]) -> AdapterStack:
    layers = [layer for _, layer in adapted_layers(model)]
    return AdapterStack(layers, list(zip(*adapters, strict=True)))


@pytest.mark.parametrize("change", ["dtype", "strengths", "bias", "weight"])
def test_what_changes_between_steps_counts_from_the_next_one(change: str) -> None:
    model, adapters = make([2, 3])
    stack, x = stacked(model, adapters), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with stack.scope(), stack.of(0):
        before = model(x)
    if change == "dtype":
        model, x = model.float(), x.float()
    if change == "bias":
        with torch.no_grad():
            model[4].bias.add_(1)
    if change == "weight":
        model[4].weight = nn.Parameter(model[4].weight.detach().roll(1, 0), requires_grad=False)
    for adapter in adapters[0] if change == "strengths" else ():
        adapter.strengths = Strengths(1.0, 1.5, 0.5)
    with stack.scope(), stack.of(0):
        ours = model(x)
    for adapter in adapters[1]:
        adapter.enabled = False
    with norm_scope(model):
        wanted = model(x)
    moved = bool((ours - before).abs().max() > 1e-3)
    assert (ours.dtype, moved) == (x.dtype, change != "dtype")
    torch.testing.assert_close(ours, wanted)


def test_under_autocast_inputs_are_cast_before_the_norm_on_their_axis() -> None:
    """Outside of autocast the layer is called directly, with factors in float32."""
    model, adapters = make([2], norm_axis="input")
    layer, stack = model.float()[4], stacked(model, adapters)
    x = torch.randn(2, 128)
    with norm_scope(model), torch.autocast("cpu", torch.bfloat16):
        wanted = layer(x)
    with stack.scope(), stack.of(0), torch.autocast("cpu", torch.bfloat16):
        ours = layer(x)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, wanted)


def test_layers_that_no_pass_reaches_have_no_gradient() -> None:
    """A second pass adds nothing to layers that the first one has not reached."""
    model, adapters = make([2])
    stack, x = stacked(model, adapters), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with norm_scope(model):
        reached = [*parameters(adapters[0][:1]), *parameters(adapters[0][1:2])]
        loss = 2 * model[0](x).sum() + model[2](model[0](x).detach()).square().sum()
        wanted = torch.autograd.grad(loss, reached)
    for _ in range(2):
        with stack.scope(), stack.of(0):
            model[0](x).sum().backward()
            with torch.no_grad():
                seen = model[0](x)
            (model[0](x).sum() + model[2](seen).square().sum()).backward()
        found = [parameter.grad for parameter in parameters(adapters[0])]
        assert all(gradient is None for gradient in found[len(reached) :])
        torch.testing.assert_close(tuple(found[: len(reached)]), wanted)
        for parameter in parameters(adapters[0]):
            parameter.grad = None


@pytest.mark.parametrize("is_training", [True, False])
def test_all_of_an_input_is_dropped_while_it_trains_and_nothing_after(is_training: bool) -> None:
    model, adapters = make([2])
    for adapter in adapters[0]:
        adapter.dropout = 1.0
    model.train(is_training)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with norm_scope(model):
        wanted = model(x)
    stack = stacked(model, adapters)
    for _ in range(2):
        with stack.scope(), stack.of(0):
            torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("parametrization", ["adalora", "vera"])
def test_what_makes_a_and_b_gets_the_gradients(parametrization: str) -> None:
    model, adapters = make([3], parametrization=parametrization, conv_rank=3)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    trained = [p for p in parameters(adapters[0]) if p.requires_grad]
    with norm_scope(model):
        wanted = torch.autograd.grad(model(x).square().sum(), trained)
    stack = stacked(model, adapters)
    with stack.scope(), stack.of(0):
        model(x).square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in trained], list(wanted))


def test_adapters_that_change_inside_of_a_step_are_refused() -> None:
    model, adapters = make([2])
    stack = stacked(model, adapters)

    def step() -> None:
        with stack.scope(), stack.of(0):
            model(torch.ones(1, 3, 8, 8, dtype=torch.float64)).sum().backward()
            with torch.no_grad():
                adapters[0][0].down.add_(1)

    with pytest.raises(RuntimeError, match="changed inside of its step"):
        step()
    assert adapters[0][0].down.grad is None


def test_what_cannot_be_stacked_is_refused() -> None:
    model, adapters = make([2])
    inject_adapters(model, AdapterConfig(targets=("*",), rank=2, use_dora=False), name="lora")
    layers = [layer for _, layer in adapted_layers(model)]
    pairs = list(zip(adapters[0], layer_adapters(model, "lora"), strict=True))
    with pytest.raises(ValueError, match="all DoRA on one norm axis or all LoRA"):
        AdapterStack(layers, pairs)
