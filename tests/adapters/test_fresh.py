"""Adapters that start from another's weights: at the start the same change, then all ranks."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from dora_diffusion.adapters.inject import attach_adapters, inject_adapters, layer_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.config import AdapterConfig, ConfigError
from dora_diffusion.numerics.weights import LayerWeights
from tests.adapters.helpers import AXES, Net, everything, move

METHODS = [{"use_dora": False}, *({"norm_axis": axis} for axis in AXES)]
# The scale of `other` is 5 / 3, no power of two.
FRESH = {"alpha": None, "conv_alpha": None}


def other(net: Net, **method) -> dict[str, LayerWeights]:
    """Weights of an adapter that has moved, by path."""
    model = copy.deepcopy(net)
    inject_adapters(model, everything(**method), generator=torch.Generator().manual_seed(1))
    move(model)
    return {
        path: layer.adapters["default"].weights().to(torch.float32)
        for path, layer in adapted_layers(model)
    }


def started(net: Net, start: dict[str, LayerWeights], **config) -> Net:
    model = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(2)
    inject_adapters(model, everything(**config), generator=generator, start=start)
    return model


def attached(net: Net, start: dict[str, LayerWeights]) -> Net:
    model = copy.deepcopy(net)
    attach_adapters(model, start, name="default")
    return model


def output(model: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), norm_scope(model):
        return model(x)


def dense(weight: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
    """``W + s B A`` in float64."""
    change = layer.scale * layer.up.double().flatten(1) @ layer.down.double().flatten(1)
    return weight.detach().double() + change.view(weight.shape)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_of_the_same_rank_it_computes_the_other_to_the_last_bit(net, x, method):
    start = other(net, **method)
    model = started(net, start, **method, **FRESH)
    assert torch.equal(output(model, x), output(attached(net, start), x))
    assert not torch.equal(output(model, x), net(x))
    assert {adapter.alpha for adapter in layer_adapters(model)} == {5.0}


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_a_larger_rank_or_another_alpha_change_nothing(net, x, method, alpha):
    start = other(net, **method)
    config = {**method, "rank": 6, "conv_rank": 7, "alpha": alpha, "conv_alpha": alpha}
    # A convolution of three inputs and a head keep their rank.
    model = started(net, start, **config)
    torch.testing.assert_close(output(model, x), output(attached(net, start), x))
    for path, layer in adapted_layers(model):
        weights, before = layer.adapters["default"].weights(), start[path]
        assert weights.rank == (7 if weights.down.ndim == 4 else 6)
        assert weights.alpha == pytest.approx(alpha or 5 / 3 * weights.rank)
        assert torch.equal(weights.down[:3], before.down)
        assert weights.down[3:].abs().max() > 0
        assert not weights.up[:, 3:].any()
        expected = dense(layer.weight, before)
        torch.testing.assert_close(dense(layer.weight, weights), expected, rtol=1e-6, atol=1e-7)


def test_all_of_a_larger_rank_learns(net, x):
    model = started(net, other(net), rank=6, conv_rank=6)
    optimizer = torch.optim.Adam(
        [p for adapter in layer_adapters(model) for p in adapter.parameters()], lr=1e-2
    )
    for _ in range(2):
        with norm_scope(model):
            model(x).square().mean().backward()
        optimizer.step()
    for path, layer in adapted_layers(model):
        weights = layer.adapters["default"].weights()
        update = dense(torch.zeros_like(layer.weight), weights).flatten(1)
        assert torch.linalg.matrix_rank(update, rtol=1e-5) == 6, path


@pytest.mark.parametrize("axis", AXES)
def test_a_dora_starts_from_a_lora_with_the_norms_of_its_weights(net, x, axis):
    start = other(net, use_dora=False)
    model = started(net, start, norm_axis=axis, **FRESH)
    torch.testing.assert_close(output(model, x), output(attached(net, start), x))
    for path, layer in adapted_layers(model):
        magnitude = layer.adapters["default"].magnitude
        weight = dense(layer.weight, start[path])
        dims = [d for d in range(weight.ndim) if d != AXES.index(axis)]
        torch.testing.assert_close(
            magnitude.double(), weight.square().sum(dims).sqrt(), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ({}, {"use_dora": False}, "it is a DoRA, which no LoRA can start from"),
        ({"norm_axis": "input"}, {}, "its magnitudes run along the input axis; set norm_axis to"),
        ({"conv_rank": 4}, {"rank": 2, "conv_rank": 3},
         r"it has rank 3 and conv_rank 4, more than conv_rank 3, rank 2; set rank 3 and con"),
        ({"conv_rank": 4}, {"rank": 3, "conv_rank": 3}, r"smaller-rank --rank 3 --conv_rank 3'"),
        ({}, {"parametrization": "vera", "alpha": None, "conv_alpha": None},
         "init_adapter sets A and B, but parametrization vera starts from other values"),
        ({}, {"init": "pissa"},
         "init_adapter sets A and B, but init pissa starts from other values"),
    ],
)  # fmt: skip
def test_what_cannot_be_the_same_is_refused(net, method, config, message):
    start = other(net, **method)
    with pytest.raises((ValueError, ConfigError), match=message):
        started(net, start, **config)


def test_layers_that_targets_leave_out_are_named_with_a_pattern_for_them(net):
    model = torch.nn.ModuleDict({"down_blocks": torch.nn.ModuleList([net, copy.deepcopy(net)])})
    start = {f"down_blocks.{n}.{path}": layer for n in (0, 1) for path, layer in other(net).items()}
    config = AdapterConfig(targets=("*square", "*wide"), rank=3)
    message = r"leave out 6 layers of the adapter, such as down_blocks.0.\w+; add '\*.conv' '\*.do"
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, config, start=start)
    wider = dataclasses.replace(config, targets=("*square", "*wide", "*.conv", "*.down", "*.point"))
    assert len(inject_adapters(model, wider, start=start).layers) == 10


def test_weights_of_another_shape_are_refused(net):
    start = {"square": other(net)["wide"]}
    with pytest.raises(ValueError, match=r"square has shape \(10, 10\), the adapter's is \(17, 10"):
        started(net, start)
