"""Tensors joined to a vector and taken apart again."""

from __future__ import annotations

import pytest
import torch

from dora_diffusion.adapters import flat as module
from dora_diffusion.adapters.flat import join, split_like

SHAPES = [(3, 4), (2,), (1, 2, 3, 1), (0, 5), ()]


@pytest.mark.parametrize("count", [1, 5])
def test_what_is_joined_comes_apart_again(count):
    tensors = [torch.randn(shape) for shape in SHAPES[:count]]
    tensors[0] = tensors[0].t().contiguous().t()
    joined = join(tensors)
    assert torch.equal(joined, torch.cat([tensor.reshape(-1) for tensor in tensors]))
    parts = split_like(joined, tensors)
    assert all(map(torch.equal, parts, tensors))
    joined.zero_()
    assert not any(part.any() for part in parts), "they are views"
    assert tensors[0].all(), "and the vector is not a view of what was joined"


def test_an_empty_tensor_keeps_its_shape_with_torch_2_6(monkeypatch):
    """Sharding gives it the shape (0,)."""
    plain = module._unflatten_dense_tensors

    def old(flat, tensors):
        return [part if part.numel() else flat.new_empty(0) for part in plain(flat, tensors)]

    monkeypatch.setattr(module, "_unflatten_dense_tensors", old)
    tensors = [torch.randn(shape) for shape in SHAPES]
    parts = split_like(join(tensors), tensors)
    assert [tuple(part.shape) for part in parts] == SHAPES


def test_a_single_contiguous_tensor_is_copied():
    tensor = torch.ones(4)
    join([tensor]).zero_()
    assert tensor.all()


def test_no_gradient_flows():
    tensors = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    assert not join(tensors).requires_grad
    assert not any(p.requires_grad for p in split_like(torch.ones(5, requires_grad=True), tensors))
