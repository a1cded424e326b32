"""Every kind of layer: from its definition, against PEFT and LyCORIS, merged and taken off."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dora_diffusion.adapters.inject import (
    adapter_parameters,
    attach_adapters,
    disabled,
    inject_adapters,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)
from dora_diffusion.adapters.kinds import adapt_layer, can_adapt
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.adapters.targets import match_targets
from dora_diffusion.config import AdapterConfig
from tests.adapters.helpers import AXES, move

IDS = torch.tensor([[3, 0, 10, 3, 7], [1, 1, 2, 0, 9]])
G = torch.Generator().manual_seed(3)
IMAGE, LINE = torch.randn(2, 6, 9, 8, generator=G), torch.randn(2, 6, 11, generator=G)

# What makes the layer, and its input.
CASES = {
    "Linear": (lambda: nn.Linear(11, 7), LINE),
    "Linear, square": (lambda: nn.Linear(11, 11, bias=False), LINE),
    "Conv2d": (lambda: nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect"), IMAGE),
    "Conv2d, strided": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), IMAGE),
    "Embedding": (lambda: nn.Embedding(11, 8), IDS),
    "Embedding, padded": (lambda: nn.Embedding(11, 5, padding_idx=0), IDS),
    "Embedding, square": (lambda: nn.Embedding(11, 11), IDS),
    "Conv1D": (lambda: Conv1D(7, 11), LINE),
    "Conv1D, square": (lambda: Conv1D(11, 11), LINE),
    "Conv1d": (lambda: nn.Conv1d(6, 9, 3, padding=1), LINE),
    "Conv1d, strided and dilated": (
        lambda: nn.Conv1d(6, 4, 2, stride=2, padding=2, dilation=3, bias=False),
        LINE,
    ),
    "Conv1d, reflected": (lambda: nn.Conv1d(6, 4, 3, padding=2, padding_mode="reflect"), LINE),
    "Conv1d, grouped": (lambda: nn.Conv1d(6, 9, 3, padding="same", groups=3), LINE),
    "Conv2d, grouped": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), IMAGE),
    "Conv2d, grouped, circular": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular", groups=2, bias=False),
        IMAGE,
    ),
    "Conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), IMAGE),
}


def made(case: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    make, x = CASES[case]
    model = nn.Sequential(make()).to(dtype)
    for parameter in model.parameters():
        # Norms of one size would not show an axis that was taken for the other.
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False), x.to(dtype) if x.is_floating_point() else x


def config(**kwargs) -> AdapterConfig:
    return AdapterConfig(targets=("*",), **{"rank": 2, "alpha": 3.0, "conv_alpha": 3.0, **kwargs})


def adapted(case: str, dtype: torch.dtype = torch.float32, **kwargs):
    """A layer whose adapter has moved, and its input."""
    model, x = made(case, dtype)
    inject_adapters(model, config(**kwargs))
    move(model)
    return model, x


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    limit = tolerance * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=limit)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
def test_merged_equals_adapted_and_unmerge_restores_every_bit(case, axis):
    model, x = adapted(case, norm_axis=axis)
    plain = type(made(case)[0][0])
    before, y = model[0].weight.clone(), model(x)
    merge_adapters(model, keep_base=True)
    assert not torch.equal(model[0].weight, before)
    close(model(x), y)
    unmerge_adapters(model)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(model(x), y)
    merge_adapters(model)
    close(model(x), y)
    assert type(model[0]) is plain


@given(
    dims=st.integers(0, 2), groups=st.integers(1, 3), out=st.integers(1, 3), into=st.integers(1, 3),
    kernel=st.integers(1, 3), stride=st.integers(1, 2), dilation=st.integers(1, 2),
    padding=st.integers(0, 2), axis=st.sampled_from(AXES), seed=st.integers(0, 1000),
)  # fmt: skip
def test_whatever_the_shape_is_it_runs_as_it_merges(
    dims, groups, out, into, kernel, stride, dilation, padding, axis, seed
):
    """Of convolutions in one and two dimensions, and of tables."""
    torch.manual_seed(seed)
    if dims:
        kind = nn.Conv1d if dims == 1 else nn.Conv2d
        layer = kind(
            into * groups, out * groups, kernel, stride, padding, dilation, groups, bias=False
        )
        x = torch.randn(1, into * groups, *[6] * dims)
    else:
        layer, x = nn.Embedding(into + kernel, out), torch.randint(into + kernel, (4,))
    model = nn.Sequential(layer).requires_grad_(False)
    inject_adapters(model, config(rank=1, norm_axis=axis))
    move(model, seed)
    with norm_scope(model):
        y = model(x)
    merge_adapters(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4 * y.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_removal_gives_the_class_and_the_output_back(case):
    model, x = made(case)
    plain, base, keys = type(model[0]), model(x), set(model.state_dict())
    inject_adapters(model, config())
    move(model)
    assert not torch.allclose(model(x), base)
    with disabled(model):
        assert torch.equal(model(x), base)
    with pytest.raises(ValueError, match="no adapter named 'other'"):
        remove_adapters(model, "other")
    remove_adapters(model)
    assert (type(model[0]), set(model.state_dict())) == (plain, keys)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize(
    "case", ["Embedding", "Conv1d", "Conv2d", "Conv2d, grouped", "Conv1D", "Linear"]
)
@pytest.mark.parametrize("axis", AXES)
def test_accumulation_and_checkpointing_give_the_same_gradients(case, axis):
    """Norms are made once for a scope, and the same norm serves all calls in it."""
    model, x = adapted(case, norm_axis=axis)

    def gradients(run) -> list[torch.Tensor]:
        model.zero_grad()
        with norm_scope(model):
            for _ in range(2):
                run(x).square().mean().backward()
        return [parameter.grad.clone() for parameter in adapter_parameters(model)]

    plain = gradients(model)
    for one, other in zip(
        plain, gradients(lambda x: checkpoint(model, x, use_reentrant=False)), strict=True
    ):
        torch.testing.assert_close(one, other)
    model.zero_grad()
    model(x).square().mean().backward()
    for one, parameter in zip(plain, adapter_parameters(model), strict=True):
        close(one, 2 * parameter.grad)


def test_dropout_of_an_embedding_drops_tokens_of_the_low_rank_path():
    model, _ = adapted("Embedding", dropout=0.4)
    ids = torch.arange(11).repeat(400)
    base = F.embedding(ids, model[0].weight)
    model.eval()
    change = model(ids) - base
    torch.manual_seed(0)
    dropped = model.train()(ids) - base
    is_kept = dropped.abs().sum(1) > 0
    close(dropped[is_kept], change[is_kept] / 0.6)
    assert abs(is_kept.float().mean().item() - 0.6) < 0.03


@pytest.mark.parametrize("axis", AXES)
def test_only_rows_that_are_looked_up_are_computed(axis):
    model, _ = adapted("Embedding", norm_axis=axis)
    ids = torch.tensor([3, 4])
    y = model(ids)
    with norm_scope(model):
        model(ids)
        model[0].weight.data[5:] = torch.nan
        assert torch.equal(model(ids), y)


def test_padding_has_no_gradient_as_in_pytorch():
    model, _ = adapted("Embedding, padded", norm_axis="input")
    adapter = model[0].adapters["default"]
    model(torch.tensor([0, 4])).sum().backward()
    assert adapter.magnitude.grad.nonzero().flatten().tolist() == [4]
    up = adapter.up.grad.clone()
    model.zero_grad()
    model(torch.tensor([4])).sum().backward()
    torch.testing.assert_close(adapter.up.grad, up)


def test_full_takes_every_layer_but_tables_which_are_named():
    model = nn.ModuleDict({name: make() for name, (make, _) in CASES.items()})
    tables = [name for name in CASES if name.startswith("Embedding")]
    assert match_targets(model, ["full"]) == [name for name in CASES if name not in tables]
    assert match_targets(model, ["Emb*"]) == tables
    report = inject_adapters(
        nn.ModuleDict(
            {"token_embedding": nn.Embedding(9, 4), "a": Conv1D(3, 4), "b": nn.Conv1d(4, 4, 3)}
        ),
        AdapterConfig(targets=("token-embedding", "full"), rank=2),
    )
    assert str(report) == "3 layers adapted (1 Embedding, 1 Conv1d, 1 Conv1D), 83 parameters"
    assert report.layers[0].weight_shape == (4, 9)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(4, 4, max_norm=1.0), "Embedding with max_norm, which changes its weight"),
        (nn.Embedding(4, 4, scale_grad_by_freq=True), "Embedding with scale_grad_by_freq"),
        (nn.Conv3d(2, 2, 1), "Conv3d, but adapters are for nn.Linear, nn.Conv1d"),
        (nn.EmbeddingBag(4, 4), "EmbeddingBag, but adapters are for"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_reason(module, reason):
    assert not can_adapt(module)
    with pytest.raises(TypeError, match=reason):
        adapt_layer(module)


def test_an_adapter_for_another_kind_of_layer_is_refused():
    model, _ = adapted("Embedding, square")
    weights = {"0": model[0].adapters["default"].weights()}
    with pytest.raises(ValueError, match="0 is a Linear, the adapter is for an Embedding"):
        attach_adapters(nn.Sequential(nn.Linear(11, 11)), weights, name="default")


@pytest.mark.parametrize("case", ["Conv1D", "Conv1D, square", "Conv2d, grouped", "Embedding"])
def test_the_module_says_how_it_stores_its_weight(case):
    """A file may not: nothing tells a Conv1D's factors from a Linear's."""
    ours, x = adapted(case)
    known = ours[0].adapters["default"].weights()
    model, _ = made(case)
    weights = dataclasses.replace(known, kind="plain", groups=1)
    attach_adapters(model, {"0": weights}, name="default")
    found = model[0].adapters["default"].weights()
    assert (found.kind, found.groups) == (known.kind, known.groups)
    assert (found.kind, found.groups) != ("plain", 1)
    y = model(x)
    merge_adapters(model)
    close(model(x), y)
    close(y, ours(x))


def peft_twin(model: nn.Module, ours: nn.Module) -> nn.Module:
    """The same adapter in PEFT."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=2, lora_alpha=3.0, use_dora=True, target_modules=["0"])
    twin = inject_adapter_in_model(settings, copy.deepcopy(model))
    for path, layer in adapted_layers(ours):
        theirs, adapter = twin.get_submodule(path), layer.adapters["default"]
        with torch.no_grad():
            for mine, their in zip(peft_order(adapter), parameters_of(theirs), strict=True):
                their.copy_(mine.view_as(their))
    return twin


def peft_order(adapter) -> tuple[torch.Tensor, ...]:
    return adapter.down, adapter.up, adapter.magnitude


def parameters_of(theirs: nn.Module) -> tuple[torch.Tensor, ...]:
    magnitude = theirs.lora_magnitude_vector["default"].weight
    if "default" in theirs.lora_embedding_A:
        return theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"], magnitude
    return theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, magnitude


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    "case",
    ["Embedding", "Embedding, square", "Conv1D", "Conv1D, square", "Conv1d",
     "Conv1d, strided and dilated"],
)  # fmt: skip
def test_outputs_gradients_and_merge_agree_with_peft(case):
    """Not grouped: PEFT's update of a grouped convolution fits no grouped weight."""
    model, x = made(case)
    ours, _ = adapted(case)
    if case == "Conv1d, strided and dilated":
        # PEFT's A does not dilate.
        x, model, ours = undilated(x, model, ours)
    twin = peft_twin(model, ours)
    y, theirs = ours(x), twin(x)
    close(y, theirs)
    upstream = torch.randn(y.shape, generator=G)
    y.backward(upstream)
    theirs.backward(upstream)
    other = twin.get_submodule("0")
    adapter = ours[0].adapters["default"]
    for mine, their in zip(peft_order(adapter), parameters_of(other), strict=True):
        close(mine.grad, their.grad.view_as(mine))
    other.merge()
    close(ours[0].merged(), other.base_layer.weight)


def undilated(x, *models):
    for model in models:
        model[0].dilation = (1,)
    return x, *models
