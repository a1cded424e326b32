"""Adapters whose A and B are made from other tensors that train: how they start, and are made.

A `LayerAdapter` trains ``down`` and ``up``. Without a direction these are A and B.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dora_diffusion.numerics.directions import moved_factors, principal_factors


class Direction(nn.Module):
    """What makes A and B of one layer from its ``down`` and ``up``; its buffers do not train."""

    def start(self) -> tuple[Tensor, Tensor]:
        """``down`` and ``up`` of a fresh adapter, whose update is 0 to the last bit."""
        raise NotImplementedError

    def forward(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """A ``(r, in, *k)`` and B ``(out, r, ...)``, differentiable."""
        raise NotImplementedError


class PrincipalDirection(Direction):
    """PiSSA (arXiv:2404.02948): the leading part of the weight itself is what moves.

    The paper trains A and B from the leading singular triplets, on the rest of the weight. Over
    the whole weight that is the update ``B A - B0 A0`` of rank 2r. What trains are the changes of
    A0 and B0: a fresh adapter is the base, and weight decay pulls towards it, not towards a weight
    that lacks its leading part.

    Args:
        weight: The layer's, ``(out, in, *k)``.
        rank: r.
        scale: s of ``s B A``.
    """

    start_down: Tensor
    start_up: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        down, up = principal_factors(weight, rank, scale)
        self.register_buffer("start_down", down)
        self.register_buffer("start_up", up)

    def start(self) -> tuple[Tensor, Tensor]:
        """No change."""
        return torch.zeros_like(self.start_down), torch.zeros_like(self.start_up)

    def forward(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of rank 2r."""
        return moved_factors(down, up, self.start_down, self.start_up)
