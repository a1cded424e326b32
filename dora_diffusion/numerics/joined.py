"""Many tensors in one, and back: on small tensors, one operation costs what one on all costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


@torch.no_grad()
def join(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of any shapes, at least one, one after the other in a new vector."""
    joined: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return joined.clone() if len(tensors) == 1 else joined


@torch.no_grad()
def split_like(joined: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """What `join` made of tensors of these shapes, as views of it in these shapes."""
    parts: Sequence[Tensor] = _unflatten_dense_tensors(joined.detach(), tensors)  # type: ignore[no-untyped-call]
    return parts
