"""Limit of the norm of each layer's update, after each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dora_diffusion.adapters.layers import LayerAdapter
from dora_diffusion.training.hooks.hook import Hook

if TYPE_CHECKING:
    from dora_diffusion.training.step import Step


class NormLimit(Hook):
    """Scales updates down to a norm (`limit_norms`).

    Args:
        step: The step of a run with ``scale_weight_norms``.
    """

    def __init__(self, step: Step) -> None:
        assert step.config.scale_weight_norms is not None
        self._limit = step.config.scale_weight_norms
        self._adapters = step.adapters.trained()

    def moved(self, number: int) -> None:
        limit_norms(self._adapters, self._limit)


@torch.no_grad()
def limit_norms(adapters: Sequence[LayerAdapter], limit: float) -> None:
    """Scale updates ``s B A`` down to a Frobenius norm, half in A and half in B.

    Equal to sd-scripts' ``scale_weight_norms``. The norms are computed from ``B^T B`` and
    ``A A^T``, so that no update is formed.

    Args:
        adapters: Adapters with A ``down`` and B ``up``.
        limit: The largest norm.
    """
    squares = []
    for adapter in adapters:
        down, up = adapter.down.flatten(1), adapter.up.flatten(1)
        product = (up.mT @ up) * (down @ down.mT)
        squares.append(product.sum() * (adapter.alpha / len(down)) ** 2)
    norms = torch.stack(squares).clamp_min(0).sqrt()
    shares = (limit / norms.clamp_min(limit)).sqrt().unbind()
    for part in ("down", "up"):
        torch._foreach_mul_([getattr(adapter, part) for adapter in adapters], list(shares))
