"""What norms, gains and merges are computed in: float32, or float64 for float64 weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def is_wide(dtype: torch.dtype) -> bool:
    """Whether small updates survive in it."""
    return dtype in (torch.float32, torch.float64)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The precision that norms and merges of a tensor are computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in the precision that norms and merges are computed in."""
    return tensor.to(wide_dtype(tensor))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products as precise as their dtype: without autocast, and without TensorFloat-32 on CUDA."""
    with torch.autocast(device.type, enabled=False):
        matmul = torch.backends.cuda.matmul
        if device.type != "cuda" or torch.compiler.is_compiling() or not matmul.allow_tf32:
            yield
            return
        matmul.allow_tf32 = False
        try:
            yield
        finally:
            matmul.allow_tf32 = True
