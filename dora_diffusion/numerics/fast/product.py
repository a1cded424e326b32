"""Products of two matrices, by the faster of the libraries that PyTorch brings."""

from __future__ import annotations

import torch
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
    if not _suits_onednn(left, right):
        return left @ right
    # A linear layer, whose weight is (out, in): it transposes what it is given.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return result


def _suits_onednn(left: Tensor, right: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and HAS_ONEDNN
        and left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        # It has no gradient.
        and not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
        and left.numel() > 0
        and right.numel() > 0
    )
