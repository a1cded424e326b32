"""``norm(W + s B A)`` through the rank, without building ``W + s B A``.

    |W + sBA|^2 = |W|^2 + 2s <W, BA> + s^2 |BA|^2

``|W|^2`` is a constant, and the other two terms cost a product of the weight with the rank-wide
factor. The price is cancellation: where the terms nearly cancel, float32 keeps nothing of the sum,
so those channels are recomputed from the dense weight.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dora_diffusion.numerics.dora import low_rank_delta, squared_norm, weight_norm
from dora_diffusion.numerics.fast.product import matrix_product
from dora_diffusion.numerics.precision import to_float64, wide
from dora_diffusion.numerics.weights import NormAxis

# Below this share of its terms' magnitudes, the factored norm may be off by more than 1e-5, and the
# channel is recomputed from the dense weight: the terms were seen to be rounded to up to ten times
# 2^-24 of them.
CANCELLATION = 1 / 32


def factored_norm(
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    axis: NormAxis,
    weight_squared_norm: Tensor | None = None,
) -> Tensor:
    """``norm(W + s B A)`` per channel without building ``W + s B A``: ``(out,)`` or ``(in,)``.

    Channels in which its terms nearly cancel are recomputed from the dense sum.

    Args:
        weight: Base weight ``(out, in, *k)``.
        down: ``A``, ``(r, in, *k)``.
        up: ``B``, ``(out, r)`` or ``(out, r, 1, 1)``.
        scale: ``s = alpha / r``.
        axis: Norm axis.
        weight_squared_norm: ``squared_norm(weight, axis)`` if it is at hand; it never changes.
    """
    base = squared_norm(weight, axis) if weight_squared_norm is None else weight_squared_norm
    total = base + squared_norm_change(weight, down, up, scale, axis)
    bound = low_rank_bound(down, up, scale, axis)
    cancelled = is_ill_conditioned(total, base, bound).nonzero().flatten()
    if len(cancelled):
        dense = _dense_channels(weight, down, up, scale, axis, cancelled)
        total[cancelled] = squared_norm(dense, axis).to(total)
    return total.sqrt()


def low_rank_bound(down: Tensor, up: Tensor, scale: float, axis: NormAxis) -> Tensor:
    """``|s| |B_i| |A|`` per output, ``|s| |A_j| |B|`` per input: ``(out,)`` or ``(in,)``.

    At least the norm of that channel of ``s B A``, however its ranks cancel one another.
    """
    factor, other = (up, down) if axis == "output" else (down, up)
    size: Tensor = torch.linalg.vector_norm(wide(other))
    return abs(scale) * size * weight_norm(wide(factor), axis)


def is_ill_conditioned(total: Tensor, base: Tensor, bound: Tensor) -> Tensor:
    """Where ``|W + sBA|^2`` is lost in the rounding of the terms that it was summed from.

    Their magnitudes are no more than ``(|W| + bound)^2`` in sum (Cauchy-Schwarz), and rounding is a
    share of these, whatever is left of them: ``|W|^2`` against the change, or rank against rank.

    Args:
        total: ``|W + sBA|^2`` per channel, as summed.
        base: ``|W|^2``.
        bound: `low_rank_bound`.
    """
    return total < CANCELLATION * (base.sqrt() + bound).square()


def squared_norm_change(
    weight: Tensor, down: Tensor, up: Tensor, scale: float, axis: NormAxis
) -> Tensor:
    """``|W + sBA|^2 - |W|^2`` per channel, ``2s <W, BA> + s^2 |BA|^2``, through the rank.

    Per output, with ``M = 2s W A' + s^2 B A A'``, it is the row sum of ``B * M``; per input the
    same with the roles of A and B exchanged.
    """
    return change_and_checksum(weight, down, up, scale, axis)[0]


def change_and_checksum(
    weight: Tensor, down: Tensor, up: Tensor, scale: float, axis: NormAxis
) -> tuple[Tensor, Tensor]:
    """`squared_norm_change`, and the weight's `checksum` from the same pass over the weight."""
    inputs, rank = weight.shape[1], down.shape[0]
    weight = wide(weight).flatten(1)
    down, up = (tensor.to(weight.dtype).flatten(1) for tensor in (down, up))
    if axis == "output":
        # The checksum is one more column of the product: one pass over the weight, not two.
        seen = matrix_product(weight, torch.cat([down, _probe(down.shape[1], down)]).t())
        product = torch.addmm(
            seen[:, :rank], up, down @ down.t(), beta=2 * scale, alpha=scale * scale
        )
        return product.mul_(up).sum(dim=1), seen[:, rank]
    seen = matrix_product(torch.cat([up.t(), _probe(up.shape[0], up)]), weight)
    product = torch.addmm(seen[:rank], up.t() @ up, down, beta=2 * scale, alpha=scale * scale)
    # (r, in * k) -> (in,): the taps of a convolution are summed with the ranks.
    change = product.mul_(down).view(rank, inputs, -1).sum(dim=(0, 2))
    return change, seen[rank].view(inputs, -1).sum(dim=1)


def checksum(weight: Tensor, axis: NormAxis) -> Tensor:
    """A number per channel that tells a weight from another: ``(out,)`` or ``(in,)``.

    It is the product with a fixed unit vector, of about ``|W_i| / sqrt(n)``, to which a difference
    between two weights would have to be orthogonal in all channels to go unseen.
    """
    rows = wide(weight).flatten(1)
    if axis == "output":
        return rows.mv(_probe(rows.shape[1], rows)[0])
    columns = rows.t().mv(_probe(rows.shape[0], rows)[0])
    return columns.view(weight.shape[1], -1).sum(dim=1)


def _probe(length: int, like: Tensor) -> Tensor:
    """The unit vector of a length, ``(1, length)``."""
    probe = _probe_on(length, like.device, like.dtype)
    if type(probe) is not Tensor:
        _probe_on.cache_clear()  # A fake tensor must not outlive the mode that made it.
    return probe


@lru_cache(maxsize=256)
def _probe_on(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # A chirp: as good as random, and the same everywhere.
    chirp = torch.arange(length, dtype=torch.float64, device="cpu").square().cos()
    return torch.div(chirp, torch.linalg.vector_norm(chirp))[None].to(device, dtype)


def _dense_channels(
    weight: Tensor, down: Tensor, up: Tensor, scale: float, axis: NormAxis, channels: Tensor
) -> Tensor:
    """The chosen channels of ``W + s B A``, in float64, where the cancellation is harmless."""
    if axis == "output":
        weight, up = weight[channels], up[channels]
    else:
        weight, down = weight[:, channels], down[:, channels]
    return to_float64(weight) + low_rank_delta(to_float64(down), to_float64(up), scale)
