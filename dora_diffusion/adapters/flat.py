"""Tensors joined to one vector, for operations on all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


@torch.no_grad()
def join(tensors: Sequence[Tensor]) -> Tensor:
    """Flatten and concatenate tensors, at least one, into a new vector."""
    joined: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return joined.clone() if len(tensors) == 1 else joined


@torch.no_grad()
def split_like(joined: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split the result of `join` into views with the shapes of the tensors."""
    views: Sequence[Tensor] = _unflatten_dense_tensors(joined.detach(), tensors)  # type: ignore[no-untyped-call]
    # In torch 2.6 empty tensors lose their shape and become (0,).
    return [p if p.numel() else p.view(t.shape) for p, t in zip(views, tensors, strict=True)]


def consecutive(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the tensors' memory as one vector; None if they do not lie one after the other."""
    first, total = tensors[0].detach(), 0
    storage, start = first.untyped_storage()._cdata, first.storage_offset()
    for tensor in tensors:
        follows = (
            tensor.untyped_storage()._cdata == storage
            and tensor.storage_offset() == start + total
            and tensor.is_contiguous()
            and tensor.dtype == first.dtype
        )
        if not follows:
            return None
        total += tensor.numel()
    return first.as_strided((total,), (1,))
