"""Change of a weight by training: its magnitude and direction, and the rank of the change.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, section 3.2. With W_0
the pretrained weight, W_t the trained one, and both taken apart along one axis,

    delta M = mean over channels of |norm(W_t) - norm(W_0)|
    delta D = mean over channels of 1 - cos(W_t, W_0)

Everything is computed in float64 and in blocks of the weight, since what training changes is small
beside the weight: the update is subtracted first, and nothing is taken from two numbers that nearly
cancel. In exact arithmetic these are the formulas above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.numerics.weights import LayerWeights, NormAxis

# Values of a weight that are in float64 at a time: few enough for a processor's cache.
_BLOCK = 2**18


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
