"""Max-norm regularization of each layer's update, after each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dora_diffusion.adapters.layers import LayerAdapter
from dora_diffusion.training.hooks.hook import Hook

if TYPE_CHECKING:
    from dora_diffusion.training.step import Step


class NormLimit(Hook):
    """Scales down updates whose norm exceeds a limit (`limit_norms`).

    Args:
        step: Step of a run with ``scale_weight_norms``.
    """

    def __init__(self, step: Step) -> None:
        assert step.config.scale_weight_norms is not None
        self._limit = step.config.scale_weight_norms
        self._adapters = step.adapters.trained()

    def moved(self, number: int) -> None:
        limit_norms(self._adapters, self._limit)


@torch.no_grad()
def limit_norms(adapters: Sequence[LayerAdapter], limit: float) -> None:
    """Scale down each update ``s B A`` whose Frobenius norm exceeds a limit.

    A and B are multiplied by the square root of the factor each, as by ``scale_weight_norms`` of
    sd-scripts. The norms are computed from ``B^T B`` and ``A A^T``; no update is formed.

    Args:
        adapters: Adapters with A as ``down`` and B as ``up``.
        limit: The largest norm.
    """
    squares = []
    for adapter in adapters:
        down, up = adapter.down.flatten(1), adapter.up.flatten(1)
        product = (up.mT @ up) * (down @ down.mT)
        squares.append(product.sum() * (adapter.alpha / len(down)) ** 2)
    norms = torch.stack(squares).clamp_min(0).sqrt()
    shares = (limit / norms.clamp_min(limit)).sqrt().unbind()
    for factor in ("down", "up"):
        torch._foreach_mul_([getattr(adapter, factor) for adapter in adapters], list(shares))
