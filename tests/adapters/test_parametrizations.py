"""Directions other than A and B: against PEFT, against dense float64, and as ordinary adapters."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from dora_diffusion.adapters.inject import (
    adapter_parameters,
    inject_adapters,
    merge_adapters,
    unmerge_adapters,
)
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.adapters.state import adapter_state, load_adapter_state
from dora_diffusion.config import AdapterConfig
from dora_diffusion.numerics.dora import adapted_norm, adapted_weight
from tests.adapters.helpers import AXES, Net, everything, move

KINDS = [{"init": "pissa"}, {"parametrization": "vera", "rank": 16}, {"parametrization": "adalora"}]


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 14), nn.Linear(14, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.silu(self.first(x)))


def two_linears() -> TwoLinears:
    torch.manual_seed(0)
    return TwoLinears().requires_grad_(False)


def batches(count: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(7, width, generator=generator) for _ in range(count)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for x in batches(steps, 10):
        target = x[:, :6].cos()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def merged_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the plain layers, by name."""
    return {n: p.detach() for n, p in model.named_parameters() if n.endswith("weight")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_one_is_the_base_to_the_last_bit(net, x, kind, axis, dtype):
    net, x = net.to(dtype), x.to(dtype)
    base = net(x)
    inject_adapters(net, everything(norm_axis=axis, **kind))
    assert torch.equal(net(x), base)
    with norm_scope(net):
        assert torch.equal(net(x), base)
    for name, layer in adapter_state({"unet": net}).items():
        weight = net.get_submodule(name.removeprefix("unet.")).weight
        assert torch.equal(adapted_weight(weight, layer).to(dtype), weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", AXES)
def test_gradients_are_those_of_the_dense_formula_in_float64(net, x, kind, axis):
    inject_adapters(net, everything(norm_axis=axis, **kind))
    move(net)
    with norm_scope(net):
        net(x).square().sum().backward()
    adapted = {n: m for n, m in net.named_modules() if hasattr(m, "adapters")}
    ours = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
    plain = Net().double().requires_grad_(False)
    reference = {}
    values = dict(plain.named_parameters())
    for name, layer in adapted.items():
        adapter = layer.adapters["default"].double()
        for key, parameter in adapter.named_parameters():
            reference[f"{name}.adapters.default.{key}"] = parameter
            parameter.grad = None
        w = adapter.weights()
        base = layer.weight.double()
        delta = (w.scale * w.up.flatten(1) @ w.down.flatten(1)).view_as(base)
        dims = (0, 2, 3) if axis == "input" else (1, 2, 3)
        dims = dims[: 1 if axis == "input" else base.ndim - 1] if base.ndim == 2 else dims
        norm = (base + delta).detach().square().sum(dim=dims, keepdim=True).sqrt()
        values[f"{name}.weight"] = w.magnitude.view(norm.shape) * (base + delta) / norm
        if layer.bias is not None:
            values[f"{name}.bias"] = layer.bias.double()
    torch.func.functional_call(plain, values, x.double()).square().sum().backward()
    assert set(ours) == set(reference)
    for name, grad in ours.items():
        expected = reference[name].grad
        torch.testing.assert_close(grad.double(), expected, rtol=2e-4,
                                   atol=2e-5 * expected.abs().max().item(), msg=name)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", AXES)
def test_what_a_file_holds_is_an_ordinary_adapter_of_the_same_output(net, x, kind, axis):
    inject_adapters(net, everything(norm_axis=axis, rslora=True, **kind))
    move(net)
    with norm_scope(net):
        expected = net(x)
    state = adapter_state({"unet": net})
    torch.manual_seed(0)
    other = Net().requires_grad_(False)
    load_adapter_state({"unet": other}, state)
    assert all(layer.adapters["default"].parametrization is None
               for layer in other.modules() if hasattr(layer, "adapters"))  # fmt: skip
    torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-5)
    base = {name: parameter.clone() for name, parameter in other.named_parameters()}
    with torch.inference_mode(), norm_scope(net):
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    merge_adapters(net, keep_base=True)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    unmerge_adapters(net)
    for name, parameter in net.named_parameters():
        if name in base and not parameter.requires_grad:
            assert torch.equal(parameter, base[name])


@pytest.mark.parametrize(
    ("use_dora", "optimizer", "rslora"),
    [(True, torch.optim.SGD, False), (True, torch.optim.AdamW, True),
     (False, torch.optim.AdamW, False)],
)  # fmt: skip
def test_pissa_trains_to_the_weights_of_pefts(use_dora, optimizer, rslora):
    settings = {"lr": 0.05} if optimizer is torch.optim.SGD else {"lr": 0.01, "weight_decay": 0.0}
    model = two_linears()
    config = AdapterConfig(targets=("*",), rank=3, alpha=4.0, init="pissa", use_dora=use_dora,
                           rslora=rslora)  # fmt: skip
    inject_adapters(model, config)
    train(model, optimizer(adapter_parameters(model), **settings), 20)
    started = merged_weights(two_linears())
    merge_adapters(model)
    theirs = peft.get_peft_model(two_linears(), peft.LoraConfig(
        r=3, lora_alpha=4, target_modules=["first", "second"], init_lora_weights="pissa",
        use_dora=use_dora, use_rslora=rslora,
    ))  # fmt: skip
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    train(theirs, optimizer(trained, **settings), 20)
    expected = merged_weights(theirs.merge_and_unload())
    for name, weight in merged_weights(model).items():
        assert (weight - started[name]).norm() > 0.05 * started[name].norm()
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


def test_pissa_is_what_peft_converts_its_own_to(tmp_path):
    model = two_linears()
    inject_adapters(model, AdapterConfig(targets=("*",), rank=3, alpha=4.0, init="pissa",
                                         use_dora=False))  # fmt: skip
    train(model, torch.optim.SGD(adapter_parameters(model), lr=0.1), 10)
    theirs = peft.get_peft_model(two_linears(), peft.LoraConfig(
        r=3, lora_alpha=4, target_modules=["first", "second"], init_lora_weights="pissa",
    ))  # fmt: skip
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    train(theirs, torch.optim.SGD(trained, lr=0.1), 10)
    theirs.save_pretrained(
        tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    read = peft.PeftModel.from_pretrained(two_linears(), tmp_path / "end")
    for name, layer in adapter_state({"unet": model}).items():
        other = read.get_submodule("base_model.model." + name.removeprefix("unet."))
        ours = layer.scale * layer.up @ layer.down
        assert layer.rank == other.r["default"] == 6
        torch.testing.assert_close(ours, other.get_delta_weight("default"), rtol=0, atol=1e-5)
        assert ours.norm() > 0.05


@pytest.mark.parametrize("use_dora", [True, False])
def test_vera_has_the_outputs_and_gradients_of_pefts(use_dora):
    """With magnitudes at the norm, which the gradient takes for constant, DVoRA is VeRA."""
    model, rank = two_linears(), 24
    config = AdapterConfig(targets=("*",), rank=rank, parametrization="vera", projection_seed=3,
                           use_dora=use_dora)  # fmt: skip
    report = inject_adapters(model, config)
    assert report.parameters == sum(rank + out + use_dora * out for out in (14, 6))
    theirs = peft.get_peft_model(two_linears(), peft.VeraConfig(
        r=rank, target_modules=["first", "second"], d_initial=0.1,
    ))  # fmt: skip
    tuner, pairs = theirs.base_model, []
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "adapters")}
    drawn = next(iter(layers.values())).adapters["default"].parametrization.projections.matrices
    tuner.vera_A["default"].copy_(drawn[1, 1].flatten(1))
    tuner.vera_B["default"].copy_(drawn[None])
    generator = torch.Generator().manual_seed(1)
    for name, layer in layers.items():
        ours, other = layer.adapters["default"], tuner.model.get_submodule(name)
        pairs += [(ours.down, other.vera_lambda_d["default"]),
                  (ours.up, other.vera_lambda_b["default"])]  # fmt: skip
        assert torch.equal(ours.down, other.vera_lambda_d["default"])
        for mine, one in pairs[-2:]:
            mine.data.add_(0.2 * torch.randn(mine.shape, generator=generator))
            one.data.copy_(mine)
        if use_dora:
            ours.magnitude.data.copy_(adapted_norm(layer.weight, ours.weights()))
    x, y = batches(2, 10)
    x, twin = x.requires_grad_(), x.detach().clone().requires_grad_()
    with norm_scope(model):
        ours = model(x)
        (ours * y[:, :6]).sum().backward()
    expected = theirs(twin)
    (expected * y[:, :6]).sum().backward()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-5)
    for mine, one in pairs:
        assert one.grad.abs().max() > 1e-3
        torch.testing.assert_close(mine.grad, one.grad, rtol=1e-5, atol=1e-5)


def test_the_leading_part_of_a_large_weight_is_what_starts_it():
    """A subspace iteration finds it where the whole decomposition would be slow."""
    weight = torch.randn(160, 200, generator=torch.Generator().manual_seed(1))
    weight += 3 * torch.outer(weight[:, 0], weight[0])  # one direction that stands out
    layer = nn.Linear(200, 160).requires_grad_(False)
    layer.weight.copy_(weight)
    inject_adapters(nn.Sequential(layer), AdapterConfig(targets=("*",), rank=4, init="pissa"))
    direction = layer.adapters["default"].parametrization
    u, s, vh = torch.linalg.svd(weight.double())
    best = (u[:, :4] * s[:4]) @ vh[:4]
    ours = (direction.start_up @ direction.start_down).double()
    error, least = (weight - ours).norm(), (weight - best).norm()
    assert least <= error < 1.002 * least


@pytest.mark.parametrize(
    "variant", [{"init": "pissa"}, {"parametrization": "vera"}, {"parametrization": "adalora"}]
)
@pytest.mark.parametrize(
    ("layer", "words"),
    [(nn.Embedding(9, 6), "an Embedding"), (nn.Conv2d(8, 8, 3, groups=2), "with groups")],
)
def test_layers_without_the_variant_are_refused_by_name(variant, layer, words):
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "other": layer})
    config = AdapterConfig(targets=("*",), rank=2, **variant)
    with pytest.raises(ValueError, match=rf"other is .*{words}.*leave it out"):
        inject_adapters(model, config)
    assert not list(adapted_layers(model))
