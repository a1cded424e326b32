"""Other numbers that train than A and B, and the A and B that they stand for.

The formula of `numerics.dora` sees A and B alone, so that norms, merges and files need not know of
any of this. Nothing here saves a tensor that a backward pass frees: with gradient accumulation one
graph is gone through several times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_diffusion.numerics.low_rank import low_rank
from dora_diffusion.numerics.precision import wide


def principal_factors(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A and B with ``s B A`` the best approximation of a weight of this rank.

    It is PiSSA's start (arXiv:2404.02948): the leading singular triplets, their
    singular values shared equally by A and B.

    Args:
        weight: ``(out, in, *k)``.
        rank: r.
        scale: s.

    Returns:
        A ``(r, in, *k)`` and B ``(out, r, ...)``, float32 or wider.
    """
    # On the CPU, so that the start is the same on every device.
    layer = low_rank(wide(weight).cpu(), rank)
    share = scale**0.5
    return (layer.down / share).to(weight.device), (layer.up / share).to(weight.device)


def moved_factors(
    down: Tensor, up: Tensor, start_down: Tensor, start_up: Tensor
) -> tuple[Tensor, Tensor]:
    """A and B of ``(B0 + b)(A0 + a) - B0 A0``, which is exactly 0 where a and b are.

    It is ``b (A0 + a) + B0 a``: no difference of large products, so that rounding takes nothing.

    Args:
        down: a, the change of A0 ``(r, in, *k)``.
        up: b, the change of B0 ``(out, r, ...)``.
        start_down: A0.
        start_up: B0.

    Returns:
        A ``(2r, in, *k)`` and B ``(out, 2r, ...)``.
    """
    return torch.cat([start_down + down, down]), torch.cat([up, start_up], dim=1)


def scaled_rows(vector: Tensor, matrix: Tensor) -> Tensor:
    """``diag(v) M``: ``(n,)`` and ``(n, ...)`` -> ``(n, ...)``, differentiable in both."""
    made: Tensor = _ScaledRows.apply(vector, matrix)  # type: ignore[no-untyped-call]
    return made


class _ScaledRows(torch.autograd.Function):
    """Keeps its inputs, none of which changes within a step, past a first backward pass."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, matrix: Tensor) -> Tensor:
        ctx.vector, ctx.matrix = vector, matrix
        return _column(vector, matrix) * matrix

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        vector, matrix = ctx.vector.detach(), ctx.matrix.detach()
        needs_vector, needs_matrix = ctx.needs_input_grad
        return (
            (grad * matrix).flatten(1).sum(dim=1) if needs_vector else None,
            _column(vector, matrix) * grad if needs_matrix else None,
        )


def _column(vector: Tensor, matrix: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (matrix.ndim - 1))
