"""Low-rank factors by singular value decomposition: of a change of weights, and of factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dora_diffusion.numerics.dora import adapted_weight
from dora_diffusion.numerics.precision import upcast
from dora_diffusion.numerics.weights import LayerWeights, oriented

_OVERSAMPLING = 16
# A round of so many power iterations that adds less than this share of all squares is the last.
_ITERATIONS, _PROGRESS = 2, 1e-7
_MOST_TURNS = 30


def weight_change(weight: Tensor, layer: LayerWeights) -> Tensor:
    """``W' - W`` in float32, ``(out, in, *k)``, for a weight as the model stores it."""
    weight = oriented(weight, layer.kind)
    return adapted_weight(weight, layer) - upcast(weight)


def approximate(
    layers: Mapping[str, LayerWeights],
    base_weight: Callable[[str], Tensor],
    rank: int,
    energy: float | None = None,
) -> tuple[dict[str, LayerWeights], dict[str, float], float]:
    """The best plain LoRA of a rank for each layer's ``W' - W``; a LoRA of that rank is itself.

    Args:
        layers: The adapter.
        base_weight: Base weight by canonical module name.
        rank: Largest rank; small layers get less.
        energy: See `low_rank`.

    Returns:
        The layers without magnitudes, per layer the relative error
        ``|D - B A| / |D|`` in the Frobenius norm, and that of all layers together.
    """
    approximations, errors = {}, {}
    all_left = all_size = 0.0
    for name, layer in layers.items():
        if layer.magnitude is None:
            approximations[name], distance, size = truncated(layer, rank, energy)
        else:
            target = weight_change(base_weight(name), layer)
            lora = low_rank(target, rank, energy)
            residual = target - (lora.up.flatten(1) @ lora.down.flatten(1)).view_as(target)
            size, distance = target.norm().item(), residual.norm().item()
            approximations[name] = dataclasses.replace(lora, kind=layer.kind, groups=layer.groups)
        errors[name] = distance / size if size else 0.0
        all_left, all_size = math.hypot(all_left, distance), math.hypot(all_size, size)
    return approximations, errors, all_left / all_size if all_size else 0.0


def low_rank(target: Tensor, rank: int, energy: float | None = None) -> LayerWeights:
    """Truncated singular value decomposition of ``(out, in, *k)`` as a plain LoRA layer.

    Args:
        target: What is approximated.
        rank: Largest rank; a small target gets less.
        energy: Take the smallest rank that holds this share of the squared singular values.
    """
    matrix = target.flatten(1)
    rank = min(rank, *matrix.shape)
    u, s, vh = _converged_svd(matrix, rank)
    if energy is not None:
        rank = rank_of_energy(s, matrix, energy)
    return balanced(u[:, :rank], s[:rank], vh[:rank], target.shape)


def balanced(u: Tensor, s: Tensor, vh: Tensor, shape: torch.Size) -> LayerWeights:
    """Singular triplets as a plain LoRA layer for a weight of a shape, alpha = rank."""
    rank, root = len(s), s.sqrt()
    up = (u * root).reshape(-1, rank, *[1] * (len(shape) - 2))
    down = (root[:, None] * vh).reshape(rank, *shape[1:])
    return LayerWeights(down.contiguous(), up.contiguous(), None, float(rank))


def truncated(
    layer: LayerWeights, rank: int, energy: float | None = None
) -> tuple[LayerWeights, float, float]:
    """The layer with the best update of a smaller rank, from its factors alone.

    ``delta = s B A`` is decomposed through two QR factorisations and the singular values of an
    ``r x r`` matrix. The magnitude stays: without the base there is no better one.

    Args:
        layer: A LoRA or DoRA layer.
        rank: Largest rank.
        energy: Take the smallest rank that holds this share of the squared singular values.

    Returns:
        The layer, itself where its rank is small enough; the Frobenius norm of what is lost of
        ``delta``, and that of ``delta``.
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
    """The smallest rank that holds a share of a matrix's squared singular values, at least 1.

    Args:
        singular_values: The leading ones, in descending order; never more than these.
        matrix: The matrix, or all of its singular values: what has their squared sum.
        energy: The share.
    """
    held = singular_values.double().square().cumsum(0)
    wanted = energy * matrix.double().square().sum()
    return min(int((held < wanted).sum()) + 1, len(held))


def random_start(matrix: Tensor, rank: int) -> Tensor | None:
    """Return where `leading_svd` starts to look for ``rank`` singular vectors: ``(in, w)``.

    None where all of them are as cheap.
    """
    width = rank + _OVERSAMPLING
    if 4 * width >= min(matrix.shape):
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)


def _converged_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`leading_svd`, until the triplets hold all that they can of the matrix.

    Few turns where singular values fall; where they hardly do, as those of noise, some twenty.
    """
    start = random_start(matrix, rank)
    width = rank if start is None else start.shape[1]
    total, held = matrix.double().square().sum().item(), -math.inf
    for _ in range(_MOST_TURNS):
        u, s, vh = leading_svd(matrix, width, start, _ITERATIONS)
        before, held = held, s[:rank].double().square().sum().item()
        if start is None or held - before <= _PROGRESS * total:
            break
        start = vh.t()
    return u[:, :rank], s[:rank], vh[:rank]


def leading_svd(
    matrix: Tensor, rank: int, start: Tensor | None, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets, by subspace iteration from ``start``; exactly without it.

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
