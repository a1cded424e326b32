"""Changes of weights by training: magnitude, direction and singular values.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, section 3.2. With W_0
the pretrained weight, W_t the trained one, and both decomposed along one axis,

    delta M = mean over channels of |norm(W_t) - norm(W_0)|
    delta D = mean over channels of 1 - cos(W_t, W_0)

Since changes are small compared to the weight, they are computed in float64, block by block, from
the difference ``W_t - W_0`` and without cancellation. In exact arithmetic the results equal the
formulas above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.numerics.weights import LayerWeights, NormAxis

# Number of values that are converted to float64 at a time, chosen for the processor's cache.
_BLOCK = 2**18


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
