"""The best plain LoRA for a change of weights, by singular value decomposition."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dora_diffusion.numerics.dora import adapted_weight
from dora_diffusion.numerics.precision import wide
from dora_diffusion.numerics.weights import LayerWeights

_OVERSAMPLING = 16
_POWER_ITERATIONS = 6


def weight_change(weight: Tensor, layer: LayerWeights) -> Tensor:
    """``W' - W`` in float32: ``(out, in, *k)``."""
    return adapted_weight(weight, layer) - wide(weight)


def approximate(
    layers: Mapping[str, LayerWeights], base_weight: Callable[[str], Tensor], rank: int
) -> tuple[dict[str, LayerWeights], dict[str, float], float]:
    """The best plain LoRA of a rank for each layer's ``W' - W``.

    Args:
        layers: The adapter.
        base_weight: Base weight by canonical module name.
        rank: Largest rank; small layers get less.

    Returns:
        The layers without magnitudes (alpha = rank), per layer the relative error
        ``|D - B A| / |D|`` in the Frobenius norm, and that of all layers together.
    """
    approximations, errors = {}, {}
    all_left = all_size = 0.0
    for name, layer in layers.items():
        target = weight_change(base_weight(name), layer)
        approximations[name] = lora = low_rank(target, rank)
        residual = target - (lora.up.flatten(1) @ lora.down.flatten(1)).view_as(target)
        size, distance = target.norm().item(), residual.norm().item()
        errors[name] = distance / size if size else 0.0
        all_left, all_size = math.hypot(all_left, distance), math.hypot(all_size, size)
    return approximations, errors, all_left / all_size if all_size else 0.0


def low_rank(target: Tensor, rank: int, seed: int = 0) -> LayerWeights:
    """Truncated singular value decomposition of ``(out, in, *k)`` as a plain LoRA layer."""
    matrix = target.flatten(1)
    rank = min(rank, *matrix.shape)
    u, s, vh = _leading_svd(matrix, rank, torch.Generator().manual_seed(seed))
    root = s.sqrt()
    up = (u * root).reshape(-1, rank, *[1] * (target.ndim - 2))
    down = (root[:, None] * vh).reshape(rank, *target.shape[1:])
    return LayerWeights(down.contiguous(), up.contiguous(), None, float(rank))


def _leading_svd(
    matrix: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets, by subspace iteration where that is much cheaper.

    Source: Halko, Martinsson and Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    width = rank + _OVERSAMPLING
    if 4 * width >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    basis = matrix @ torch.randn(matrix.shape[1], width, generator=generator)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank]
