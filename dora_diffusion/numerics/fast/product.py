"""Products of two matrices, by the faster of the libraries that PyTorch brings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_ONEDNN: bool = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of two matrices.

    In float32 on a CPU, PyTorch asks BLAS. oneDNN, which computes its convolutions, is faster where
    BLAS is not made for the processor, and most of all where a matrix is thin.
    """
    return left @ right if not suits_onednn(left, right) else linear(left, right.t())


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for ``x (..., in)`` and a weight ``(out, in)``."""
    if not suits_onednn(x, weight):
        return F.linear(x, weight)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


def suits_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN can have the product of two tensors, and no gradient of it is wanted."""
    return (
        HAS_ONEDNN
        and left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and not torch.compiler.is_compiling()
        # It has no gradient.
        and not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
        and left.numel() > 0
        and right.numel() > 0
    )
