"""Changes of weights: magnitude and direction, singular values, and low-rank approximation.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, section 3.2. With W_0
the pretrained weight, W_t the trained one, and both decomposed along one axis,

    delta M = mean over channels of |norm(W_t) - norm(W_0)|
    delta D = mean over channels of 1 - cos(W_t, W_0)

Since changes are small compared to the weight, they are computed in float64, block by block, from
the difference ``W_t - W_0`` and without cancellation. In exact arithmetic the results equal the
formulas above.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.numerics.dora import weight_change
from dora_diffusion.numerics.precision import upcast
from dora_diffusion.numerics.weights import LayerWeights, NormAxis

_OVERSAMPLING = 16
# Power iterations per round, and the gain in squared singular values, as a share, that ends them.
_ITERATIONS, _PROGRESS = 2, 1e-7
_MOST_TURNS = 30
# Number of values that are converted to float64 at a time, chosen for the processor's cache.
_BLOCK = 2**18


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


@dataclass(frozen=True)
class Decomposition:
    """Change of a weight ``(out, in, *k)``, as means over the channels of an axis.

    Attributes:
        delta_m: Mean ``|norm(W_t) - norm(W_0)|``.
        delta_d: Mean ``1 - cos(W_t, W_0)``, from 0 to 2. Channels with a norm of 0 in either weight
            have no direction and are excluded. 0 if no channels are left.
        norm: Mean ``norm(W_0)``, to which ``delta_m`` is relative in reports.
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
        axis: Axis of the channels.

    Raises:
        ValueError: If the shapes differ or have fewer than two dimensions.
    """
    if weight.shape != tuned.shape or weight.ndim < 2:
        raise ValueError(
            f"both weights must have the same shape with two dimensions or more, got "
            f"{tuple(weight.shape)} and {tuple(tuned.shape)}"
        )
    squares, tuned_squares, change, growth = _channel_sums(weight, tuned, axis)
    norm, tuned_norm = squares.sqrt(), tuned_squares.sqrt()
    # norm(W_t) - norm(W_0) without cancellation.
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
    """Return ``|W_0|^2, |W_t|^2, |D|^2, <D, W_0 + W_t>`` per channel, ``(4, n)``; D: the change."""
    sums = []
    for start, length in _blocks(weight.shape[0], weight[0].numel()):
        before = weight.narrow(0, start, length).double()
        after = tuned.narrow(0, start, length).double()
        change = after - before
        products = torch.stack(
            [before.square(), after.square(), change.square(), change * (before + after)]
        )
        outputs, inputs = products.shape[1:3]
        dims = (2, 3) if axis == "output" else (1, 3)
        sums.append(products.view(4, outputs, inputs, -1).sum(dims))
    return torch.cat(sums, dim=1) if axis == "output" else torch.stack(sums).sum(0)


@torch.no_grad()
def singular_values(weight: Tensor, tuned: Tensor) -> Tensor:
    """Compute all singular values of ``W_t - W_0``, as ``(out, in * k)``, in descending order.

    They are computed from the Gram matrix of the shorter side in float64, with an error of about
    1e-8 of the largest one. This takes a fraction of the time and memory of a complete
    decomposition. Returns ``(min(out, in * k),)``, float64.
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
    """Compute the singular values of ``s B A`` in descending order, by QR of the factors.

    Returns at most r values, float64. For a plain LoRA, ``s B A`` is ``W_t - W_0``.
    """
    down, up = layer.down.flatten(1).double(), layer.up.flatten(1).double()
    left, right = torch.linalg.qr(up).R, torch.linalg.qr(down.t()).R
    values: Tensor = torch.linalg.svdvals(layer.scale * (left @ right.t()))
    return values


def effective_rank(values: Tensor) -> float:
    """Return ``exp`` of the entropy of singular values as shares of their sum; 0 if all are 0.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007. r equal values give r.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    entropy: Tensor = torch.special.entr(values / total).sum()
    return entropy.exp().item()


def _blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield start and length of blocks of slices with ``size`` values each."""
    step = max(1, _BLOCK // max(1, size))
    for start in range(0, count, step):
        yield start, min(step, count - start)
