"""Low-rank approximation of weights and of their changes: truncated SVD, balanced factors."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dora_diffusion.numerics.dora import weight_change
from dora_diffusion.numerics.precision import upcast
from dora_diffusion.numerics.weights import LayerWeights

_OVERSAMPLING = 16
# Power iterations per round, and the gain in squared singular values, as a share, that ends them.
_ITERATIONS, _PROGRESS = 2, 1e-7
_MOST_TURNS = 30


def plain_lora(
    weight: Tensor, layer: LayerWeights, rank: int, energy: float | None = None
) -> tuple[LayerWeights, float, float]:
    """Find the best plain LoRA of a rank for ``W' - W`` of a layer.

    Args:
        weight: Base weight, as the model stores it.
        layer: LoRA or DoRA layer.
        rank: Largest rank; smaller for small layers.
        energy: See `low_rank`.

    Returns:
        The layer without a magnitude, the Frobenius norm of the error, and the Frobenius norm of
        ``W' - W``.
    """
    target = weight_change(weight, layer)
    lora = low_rank(target, rank, energy)
    residual = target - (lora.up.flatten(1) @ lora.down.flatten(1)).view_as(target)
    lora = dataclasses.replace(lora, kind=layer.kind, groups=layer.groups)
    return lora, residual.norm().item(), target.norm().item()


def low_rank(target: Tensor, rank: int, energy: float | None = None) -> LayerWeights:
    """Approximate ``(out, in, *k)`` by a plain LoRA layer (truncated singular value decomposition).

    Args:
        target: Tensor to approximate.
        rank: Largest rank; smaller for small tensors.
        energy: Use the smallest rank with this share of the squared singular values.
    """
    matrix = target.flatten(1)
    rank = min(rank, *matrix.shape)
    u, s, vh = _converged_svd(matrix, rank)
    if energy is not None:
        rank = rank_of_energy(s, matrix, energy)
    return balanced(u[:, :rank], s[:rank], vh[:rank], target.shape)


def balanced(u: Tensor, s: Tensor, vh: Tensor, shape: torch.Size) -> LayerWeights:
    """Convert singular triplets to a plain LoRA layer with alpha = rank."""
    rank, root = len(s), s.sqrt()
    up = (u * root).reshape(-1, rank, *[1] * (len(shape) - 2))
    down = (root[:, None] * vh).reshape(rank, *shape[1:])
    return LayerWeights(down.contiguous(), up.contiguous(), None, float(rank))


def truncated(
    layer: LayerWeights, rank: int, energy: float | None = None
) -> tuple[LayerWeights, float, float]:
    """Reduce the rank of a layer without its base weight.

    ``delta = s B A`` is decomposed by two QR factorisations and the singular values of an ``r x r``
    matrix. The magnitude is kept, since improving it would require the base weight.

    Args:
        layer: LoRA or DoRA layer.
        rank: Largest rank.
        energy: Use the smallest rank with this share of the squared singular values.

    Returns:
        The layer (unchanged if its rank is small enough), the Frobenius norm of the error of
        ``delta``, and the Frobenius norm of ``delta``.
    """
    left = torch.linalg.qr(upcast(layer.up).flatten(1).double())
    right = torch.linalg.qr(upcast(layer.down).flatten(1).double().t())
    u, s, vh = torch.linalg.svd(layer.scale * left.R @ right.R.t(), full_matrices=False)
    rank = min(rank, len(s))
    if energy is not None:
        rank = min(rank, rank_of_energy(s, s, energy))
    size = s.norm().item()
    if rank >= layer.rank:
        return layer, 0.0, size
    u, vh, shape = left.Q @ u[:, :rank], vh[:rank] @ right.Q.t(), torch.Size(layer.weight_shape)
    smaller = balanced(u, s[:rank], vh, shape).to(layer.down.dtype)
    smaller = dataclasses.replace(layer, down=smaller.down, up=smaller.up, alpha=smaller.alpha)
    return smaller, s[rank:].norm().item(), size


def rank_of_energy(singular_values: Tensor, matrix: Tensor, energy: float) -> int:
    """Return the smallest rank with a share of a matrix's squared singular values, at least 1.

    Args:
        singular_values: Leading singular values in descending order; their number is the largest
            rank.
        matrix: The matrix or all its singular values, for the sum of squares.
        energy: The share.
    """
    sums = singular_values.double().square().cumsum(0)
    threshold = energy * matrix.double().square().sum()
    return min(int((sums < threshold).sum()) + 1, len(sums))


def random_start(matrix: Tensor, rank: int) -> Tensor | None:
    """Return the random start ``(in, w)`` of `leading_svd` for ``rank`` singular vectors.

    None if a complete decomposition is not more expensive.
    """
    width = rank + _OVERSAMPLING
    if 4 * width >= min(matrix.shape):
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)


def _converged_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate `leading_svd` until convergence.

    It takes a few rounds if the singular values decrease, and about twenty if they hardly do, as
    for noise.
    """
    start = random_start(matrix, rank)
    width = rank if start is None else start.shape[1]
    total, energy = matrix.double().square().sum().item(), -math.inf
    for _ in range(_MOST_TURNS):
        u, s, vh = leading_svd(matrix, width, start, _ITERATIONS)
        before, energy = energy, s[:rank].double().square().sum().item()
        if start is None or energy - before <= _PROGRESS * total:
            break
        start = vh.t()
    return u[:, :rank], s[:rank], vh[:rank]


def leading_svd(
    matrix: Tensor, rank: int, start: Tensor | None, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the leading singular triplets by subspace iteration, or exactly without ``start``.

    Source: Halko, Martinsson and Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    if start is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    basis = matrix @ start
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank]
