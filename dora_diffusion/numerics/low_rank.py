"""Changes of weights: magnitude and direction, singular values, and the best factors of low rank.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, section 3.2. With W_0
the pretrained weight, W_t the trained one, and both taken apart along one axis,

    delta M = mean over channels of |norm(W_t) - norm(W_0)|
    delta D = mean over channels of 1 - cos(W_t, W_0)

These are computed in float64 and in blocks of the weight, since what training changes is small
beside the weight: the update is subtracted first, and nothing is taken from two numbers that nearly
cancel. In exact arithmetic these are the formulas above.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.numerics.dora import adapted_weight
from dora_diffusion.numerics.precision import upcast
from dora_diffusion.numerics.weights import LayerWeights, NormAxis, out_in

_OVERSAMPLING = 16
# A round of so many power iterations that adds less than this share of all squares is the last.
_ITERATIONS, _PROGRESS = 2, 1e-7
_MOST_TURNS = 30
# Values of a weight that are in float64 at a time: few enough for a processor's cache.
_BLOCK = 2**18


def weight_change(weight: Tensor, layer: LayerWeights) -> Tensor:
    """``W' - W`` in float32, ``(out, in, *k)``, for a weight as the model stores it."""
    weight = out_in(weight, layer.kind)
    return adapted_weight(weight, layer) - upcast(weight)


def plain_lora(
    weight: Tensor, layer: LayerWeights, rank: int, energy: float | None = None
) -> tuple[LayerWeights, float, float]:
    """The best plain LoRA of a rank for a layer's ``W' - W``.

    Args:
        weight: The base weight, as the model stores it.
        layer: A LoRA or DoRA layer.
        rank: Largest rank; small layers get less.
        energy: See `low_rank`.

    Returns:
        The layer without a magnitude; the Frobenius norm of what is lost of ``W' - W``, and that of
        ``W' - W``.
    """
    target = weight_change(weight, layer)
    lora = low_rank(target, rank, energy)
    residual = target - (lora.up.flatten(1) @ lora.down.flatten(1)).view_as(target)
    lora = dataclasses.replace(lora, kind=layer.kind, groups=layer.groups)
    return lora, residual.norm().item(), target.norm().item()


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


@dataclass(frozen=True)
class Decomposition:
    """Change of a weight ``(out, in, *k)``, as means over the channels of an axis.

    Attributes:
        delta_m: Mean ``|norm(W_t) - norm(W_0)|``, in the unit of the weight.
        delta_d: Mean ``1 - cos(W_t, W_0)``, from 0 to 2. Channels of norm 0 in either weight have
            no direction and are left out; 0 where no channel is left.
        norm: Mean ``norm(W_0)``, by which ``delta_m`` becomes relative.
        squared_change: ``|W_t - W_0|^2`` in the Frobenius norm.
        squared_norm: ``|W_0|^2``.
    """

    delta_m: float
    delta_d: float
    norm: float
    squared_change: float
    squared_norm: float


@torch.no_grad()
def decompose(weight: Tensor, tuned: Tensor, axis: NormAxis) -> Decomposition:
    """Decompose the change of a weight into magnitude and direction.

    Args:
        weight: W_0 ``(out, in, *k)``, any floating dtype.
        tuned: W_t, of the same shape.
        axis: What a channel is: an output, or an input.

    Raises:
        ValueError: If the shapes differ, or are not those of a matrix or a kernel.
    """
    if weight.shape != tuned.shape or weight.ndim < 2:
        raise ValueError(
            f"weights of one shape with two dimensions or more are needed, got "
            f"{tuple(weight.shape)} and {tuple(tuned.shape)}"
        )
    squares, tuned_squares, change, growth = _channel_sums(weight, tuned, axis)
    norm, tuned_norm = squares.sqrt(), tuned_squares.sqrt()
    # norm(W_t) - norm(W_0), without taking one from the other.
    moved = growth / (norm + tuned_norm).clamp_min(torch.finfo(torch.float64).tiny)
    has_direction = (norm > 0) & (tuned_norm > 0)
    # 1 - cos: |W_t - W_0|^2 = (norm_t - norm_0)^2 + 2 norm_0 norm_t (1 - cos).
    turned = (change - moved.square()).clamp_min(0)[has_direction]
    turned = turned / (2 * norm * tuned_norm)[has_direction]
    return Decomposition(
        delta_m=moved.abs().mean().item(),
        delta_d=turned.mean().item() if turned.numel() else 0.0,
        norm=norm.mean().item(),
        squared_change=change.sum().item(),
        squared_norm=squares.sum().item(),
    )


def _channel_sums(weight: Tensor, tuned: Tensor, axis: NormAxis) -> Tensor:
    """``|W_0|^2, |W_t|^2, |D|^2`` and ``<D, W_0 + W_t>`` per channel, D the change: ``(4, n)``."""
    parts = []
    for start, length in _blocks(weight.shape[0], weight[0].numel()):
        before = weight.narrow(0, start, length).double()
        after = tuned.narrow(0, start, length).double()
        change = after - before
        products = torch.stack(
            [before.square(), after.square(), change.square(), change * (before + after)]
        )
        outputs, inputs = products.shape[1:3]
        dims = (2, 3) if axis == "output" else (1, 3)
        parts.append(products.view(4, outputs, inputs, -1).sum(dims))
    return torch.cat(parts, dim=1) if axis == "output" else torch.stack(parts).sum(0)


@torch.no_grad()
def singular_values(weight: Tensor, tuned: Tensor) -> Tensor:
    """All singular values of ``W_t - W_0`` as a matrix ``(out, in * k)``, the largest first.

    From the Gram matrix of the shorter side in float64: exact up to about 1e-8 of the largest, at
    a fraction of the price and memory of a decomposition of the whole. Returns
    ``(min(out, in * k),)``, float64.
    """
    before, after = weight.flatten(1), tuned.flatten(1)
    if before.shape[0] > before.shape[1]:
        before, after = before.t(), after.t()
    short, long = before.shape
    gram = torch.zeros(short, short, dtype=torch.float64, device=weight.device)
    for start, length in _blocks(long, short):
        change = after.narrow(1, start, length).double()
        change = change - before.narrow(1, start, length).double()
        gram.addmm_(change, change.t())
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.flip(0).clamp_min(0).sqrt()


@torch.no_grad()
def low_rank_singular_values(layer: LayerWeights) -> Tensor:
    """The singular values of ``s B A``, the largest first, from QR of the factors alone.

    Returns at most r of them, float64. Of a plain LoRA, this is ``W_t - W_0``.
    """
    down, up = layer.down.flatten(1).double(), layer.up.flatten(1).double()
    left, right = torch.linalg.qr(up).R, torch.linalg.qr(down.t()).R
    values: Tensor = torch.linalg.svdvals(layer.scale * (left @ right.t()))
    return values


def effective_rank(values: Tensor) -> float:
    """``exp`` of the entropy of the singular values as shares of their sum; 0 if all are 0.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007. r equal values give r.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    entropy: Tensor = torch.special.entr(values / total).sum()
    return entropy.exp().item()


def _blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and length of neighbouring slices, of ``size`` values each, that fit a block."""
    step = max(1, _BLOCK // max(1, size))
    for start in range(0, count, step):
        yield start, min(step, count - start)
