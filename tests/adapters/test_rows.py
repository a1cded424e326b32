"""Rows of a batch with adapters of their own give what each adapter alone gives for its row."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from dora_diffusion import (
    AdapterConfig,
    disabled,
    inject_adapters,
    norm_scope,
    remove_adapters,
    set_strength,
)
from dora_diffusion.adapters.inject import layer_adapters
from dora_diffusion.adapters.layers import AdaptedLayer, adapted_layers
from dora_diffusion.adapters.norm_routes import NormRoute, _each_by_itself
from dora_diffusion.adapters.scope import FixedNorms, NormCache, row_scope
from dora_diffusion.numerics.weights import Strengths

ROWS = ["a", "b", None, "a", "c", "d"]


class Model(nn.Module):
    """Every kind of layer that can carry an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.time = nn.Linear(8, 8)
        self.out = nn.Linear(8, 6, bias=False)

    def forward(self, ids, images):
        words = self.line(self.words(ids).mT).mT
        maps = self.grouped(self.conv(images).sin())
        seen = maps.flatten(2).mT + self.time(words.mean(1))[:, None]
        return self.out(torch.cat([seen, words], 1).cos())


def adapted(dtype=torch.float64, axes=("output",) * 4, dropout=0.0, kinds=("*",) * 4):
    torch.manual_seed(0)
    model = Model().to(dtype)
    dora = {"a": True, "b": True, "c": False, "d": True}
    for (name, use_dora), rank, axis, targets in zip(
        dora.items(), (2, 4, 1, 3), axes, kinds, strict=True
    ):
        config = AdapterConfig(
            targets=(targets,), rank=rank, alpha=3, use_dora=use_dora, norm_axis=axis,
            dropout=dropout,
        )  # fmt: skip
        inject_adapters(model, config, name=name)
    with torch.no_grad():
        for adapter in layer_adapters(model):
            adapter.up.normal_(std=0.3)
            if adapter.magnitude is not None:
                adapter.magnitude.mul_(torch.rand_like(adapter.magnitude) + 0.5)
    return model.to(dtype)


def inputs(batch, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(11, (batch, 5), generator=generator)
    return ids, torch.randn(batch, 4, 8, 8, generator=generator, dtype=dtype)


def one_by_one(model, rows, ids, images):
    """Every row by itself, with all adapters but its own switched off."""
    made = []
    for row, name in enumerate(rows):
        for adapter in layer_adapters(model):
            adapter.enabled = False
        for adapter in layer_adapters(model, name) if name else ():
            adapter.enabled = True
        made.append(model(ids[row : row + 1], images[row : row + 1]))
    for adapter in layer_adapters(model):
        adapter.enabled = True
    return torch.cat(made)


@pytest.mark.parametrize(
    "axes", [("output",) * 4, ("input",) * 4, ("output", "input") * 2], ids=str
)
@pytest.mark.parametrize("repeats", [1, 2])
def test_outputs_and_gradients_are_those_of_each_adapter_alone(axes, repeats):
    model, rows = adapted(axes=axes), ROWS * repeats
    ids, images = inputs(len(rows))
    weight = torch.randn(len(rows), 21, 6, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(outputs):
        loss = (outputs * weight).sum()
        return torch.autograd.grad(loss, [images, *parameters])

    images.requires_grad_()
    expected = one_by_one(model, rows, ids, images)
    with row_scope(model, rows=ROWS, cache=NormCache()):
        found = model(ids, images)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        for ours, theirs in zip(gradients(found), gradients(expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    # What acts afterwards is all adapters at once, as before.
    assert not torch.equal(model(ids, images), found)


def test_rows_without_an_adapter_are_exactly_the_base():
    model = adapted(torch.float32)
    ids, images = inputs(6, torch.float32)
    with disabled(model):
        base = model(ids, images)
    with row_scope(model, rows=[None, "a", None, None, "b", None]), torch.no_grad():
        found = model(ids, images)
    bare = [0, 2, 3, 5]
    assert torch.equal(found[bare], base[bare])
    assert not torch.allclose(found[1], base[1], atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str
)
def test_precisions_agree_and_the_dense_product_is_one(dtype, within, monkeypatch):
    model = adapted(dtype, kinds=("time", "time", "out", "conv"))
    ids, images = inputs(6, dtype)
    counted = []
    operands = AdaptedLayer.operands
    monkeypatch.setattr(
        AdaptedLayer, "operands", lambda self, x: counted.append(len(x)) or operands(self, x)
    )
    with torch.no_grad():
        expected = one_by_one(model, ROWS, ids, images)
        counted.clear()
        with row_scope(model, rows=ROWS):
            found = model(ids, images)
    assert counted == [6, 6, 6]
    assert (found - expected).abs().max() < within * expected.abs().max()


def test_strengths_act_on_each_row_of_their_adapter():
    model = adapted()
    set_strength(model, 0.4, name="a")
    set_strength(model, 0.7, direction=0.5, magnitude=0.3, name="b")
    set_strength(model, -0.5, name="c")
    set_strength(model, 0.0, name="d")
    ids, images = inputs(6)
    expected = one_by_one(model, ROWS, ids, images)
    for grad in (torch.no_grad, torch.enable_grad):
        with row_scope(model, rows=ROWS), grad():
            torch.testing.assert_close(model(ids, images), expected, rtol=1e-11, atol=1e-11)


def halve(model):
    """As a schedule of strengths does between denoising steps."""
    for adapter in layer_adapters(model, "a"):
        adapter.strengths = Strengths(0.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: set_strength(model, 0.4, direction=0.5, name="a"),
        lambda model: set_strength(model, direction=0.5, name="a"),
        halve,
        lambda model: remove_adapters(model, "a"),
    ],
    ids=["strengths", "direction", "schedule", "removed"],
)
def test_what_changes_inside_counts_from_the_next_call(change):
    model = adapted()
    ids, images = inputs(6)
    with row_scope(model, rows=ROWS), torch.no_grad():
        model(ids, images)
        change(model)
        found = model(ids, images)
    torch.testing.assert_close(found, one_by_one(model, ROWS, ids, images))


def test_a_channel_of_small_gain_has_its_gradient():
    model = adapted(kinds=("time",) * 4)
    with torch.no_grad():
        for adapter in layer_adapters(model):
            if adapter.magnitude is not None:
                adapter.magnitude[:2] = 0
    ids, images = inputs(6)
    magnitudes = [a.magnitude for a in layer_adapters(model) if a.magnitude is not None]
    weight = torch.randn(6, 21, 6, dtype=torch.float64)
    with norm_scope(model):
        expected = one_by_one(model, ROWS, ids, images)
        theirs = torch.autograd.grad((expected * weight).sum(), magnitudes)
    with row_scope(model, rows=ROWS):
        found = model(ids, images)
        ours = torch.autograd.grad((found * weight).sum(), magnitudes)
    torch.testing.assert_close(found, expected)
    assert all(bool((gradient[:2] != 0).all()) for gradient in theirs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_adapters_whose_norms_stay_compute_the_same_in_every_kind_of_layer(axis):
    model, cache = adapted(axes=(axis,) * 4), FixedNorms()
    ids, images = inputs(6)
    with torch.no_grad():
        expected = one_by_one(model, ROWS, ids, images)
        for _ in range(2):
            with row_scope(model, rows=ROWS, cache=cache):
                torch.testing.assert_close(model(ids, images), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["a", None])
def test_rows_that_are_all_alike_have_no_other_adapter(name):
    model = adapted(kinds=("time", "conv", "*", "words"))
    ids, images = inputs(3)
    with row_scope(model, rows=[name] * 3):
        found = model(ids, images)
    torch.testing.assert_close(found, one_by_one(model, [name] * 3, ids, images))


def test_rows_in_an_open_scope_use_its_norms_and_leave_it_open(monkeypatch):
    model, made = adapted(), []
    ids, images = inputs(6)
    layers = [layer for _, layer in adapted_layers(model)]
    expected = one_by_one(model, ROWS, ids, images)
    with norm_scope(model):
        outer = [layer.route for layer in layers]
        monkeypatch.setattr(NormRoute, "keep", lambda self, name, *rest: made.append(name))
        with row_scope(model, rows=ROWS):
            torch.testing.assert_close(model(ids, images), expected, rtol=1e-11, atol=1e-11)
        with norm_scope(model):
            assert [layer.route for layer in layers] == outer
        assert made == []
        assert [layer.route for layer in layers] == outer


def test_a_written_parameter_is_noticed_and_a_copy_has_no_rows():
    model = adapted()
    ids, images = inputs(6)
    with row_scope(model, rows=ROWS):
        model(ids, images)
        alone = copy.deepcopy(model)
        with torch.no_grad():
            next(layer_adapters(model, "a")).up.zero_()
        with pytest.raises(RuntimeError, match="changed inside norm_scope"):
            model(ids, images)
    alone(*inputs(5))


def test_what_cannot_be_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match=r"no adapter named 'x'; there are a, b, c, d"):
        row_scope(model, rows=["a", "x"]).__enter__()
    with pytest.raises(ValueError, match="no rows are given"):
        row_scope(model, rows=[]).__enter__()
    with row_scope(model, rows=["a", "b"]), pytest.raises(ValueError, match=r"batch of 3.* 2 rows"):
        model(*inputs(3))
    model(*inputs(3))
    # Taken off inside, a layer is the plain one again.
    with row_scope(model, rows=["a", "b"]):
        remove_adapters(model)
    assert type(model.out) is nn.Linear


def test_layers_that_are_batched_are_not_computed_adapter_by_adapter(monkeypatch):
    """The path of the other rows is a second way to the same numbers."""
    model = adapted(kinds=("[toc]*",) * 4)
    ids, images = inputs(6)
    by_itself = []
    monkeypatch.setattr(
        "dora_diffusion.adapters.norm_routes._each_by_itself",
        lambda layer, *rest: (
            by_itself.append(type(layer).__name__) or _each_by_itself(layer, *rest)
        ),
    )
    with row_scope(model, rows=ROWS):
        model(ids, images)
    assert by_itself == []
    model = adapted()
    with row_scope(model, rows=ROWS):
        partial(model, ids)(images)
    assert sorted(by_itself) == ["DoRAConv1d", "DoRAConv2d", "DoRAEmbedding"]
