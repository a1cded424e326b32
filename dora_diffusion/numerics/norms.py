"""``norm(W + s B A)`` through the rank, without building ``W + s B A``.

    |W + sBA|^2 = |W|^2 + 2s <W, BA> + s^2 |BA|^2

``|W|^2`` is a constant, and the other two terms cost a product of the weight with the rank-wide
factor. The price is cancellation: where the terms nearly cancel, float32 keeps nothing of the sum,
so those channels are recomputed from the dense weight.

Layers of one shape are computed together: but for the products with their weights, an operation
serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dora_diffusion.numerics.dora import low_rank_delta, squared_norm
from dora_diffusion.numerics.precision import to_float64, upcast, upcast_dtype
from dora_diffusion.numerics.weights import NormAxis

# Below this share of its terms' magnitudes, the factored norm may be off by more than 1e-5, and the
# channel is recomputed from the dense weight: the terms were seen to be rounded to up to ten times
# 2^-24 of them.
CANCELLATION = 1 / 32


class Terms(NamedTuple):
    """Terms of the norms of layers with one shape, each ``(n, channels)``.

    Attributes:
        change: ``|W + sBA|^2 - |W|^2``.
        bound: ``|s| |B_i| |A|`` per output, ``|s| |A_j| |B|`` per input: at least ``|sBA|`` of that
            channel, however its ranks cancel one another.
        checksum: The weights' `checksum`, one for each, from the same pass over them.
    """

    change: Tensor
    bound: Tensor
    checksum: Tensor


def norm_terms(
    weights: Sequence[Tensor], down: Tensor, up: Tensor, s: float, axis: NormAxis,
    parts: Sequence[Tensor],
) -> Terms:  # fmt: skip
    """The terms of the factored norms of n layers whose weights have one shape and dtype.

    Per output, with ``M = 2s W A' + s^2 B A A'``, the change is the row sum of ``B * M``; per input
    the same with the roles of A and B exchanged. Several adapters of each layer, K of a layer
    before those of the next, count as n K layers in all but the weights.

    Args:
        weights: Their base weights ``(out, in, *k)``.
        down: ``A``, ``(n, r, in * k)``, float32 (float64 for float64 weights).
        up: ``B``, ``(n, out, r)``, in the same precision.
        s: The scale.
        axis: Norm axis.
        parts: What the weights are multiplied with, A on the output axis and B on the input axis:
            itself, or, where `widens` says so, its `parts_of`.
    """
    if axis == "output":
        # The checksum is one more column of the product: one pass over the weight, not two.
        seen, checksum = _products(weights, parts, "output")
        gram = torch.bmm(down, down.mT)
        change = torch.baddbmm(seen, up, gram, beta=2 * s, alpha=s * s).mul_(up).sum(dim=2)
        own, other = torch.linalg.vector_norm(up, dim=2), torch.linalg.vector_norm(down, dim=(1, 2))
    else:
        inputs = weights[0].shape[1]
        seen, sums = _products(weights, [part.mT for part in parts], "input")
        gram = torch.bmm(up.mT, up)
        product = torch.baddbmm(seen, gram, down, beta=2 * s, alpha=s * s).mul_(down)
        # (n, r, in * k) -> (n, in): the taps of a convolution are summed with the ranks.
        change = torch.unflatten(product, 2, (inputs, -1)).sum(dim=(1, 3))
        own = torch.linalg.vector_norm(torch.unflatten(down, 2, (inputs, -1)), dim=(1, 3))
        other = torch.linalg.vector_norm(up, dim=(1, 2))
        checksum = torch.unflatten(sums, 1, (inputs, -1)).sum(dim=2)
    bound = own.mul_(other[:, None])
    return Terms(change, bound if s == 1 else bound.mul_(abs(s)), checksum)


def _products(
    weights: Sequence[Tensor], parts: Sequence[Tensor], axis: NormAxis
) -> tuple[Tensor, Tensor]:
    """Products of each weight with its factor, and with the probe of the checksum.

    Args:
        weights: n weights ``(out, in, *k)``.
        parts: The factors' parts, each ``(n, r, in * k)`` on the output axis, ``(n, r, out)`` on
            the input axis.
        axis: Which side of the weight the factor is on.

    Returns:
        ``(n, out, r)`` and ``(n, out)``, or ``(n, r, in * k)`` and ``(n, in * k)``.
    """
    count, length = len(weights), parts[0].shape[2]
    adapters = len(parts[0]) // count
    if adapters > 1:  # Those of one weight are columns of one product.
        parts = [part.reshape(count, -1, length) for part in parts]
    rank = parts[0].shape[1]
    probe = _probe(length, parts[0]).expand(count, 1, length)
    rows = torch.cat([*parts, probe], dim=1).unbind()
    made = _batch(weights, rows, axis, parts[0].dtype)
    dim, columns = 2 if axis == "output" else 1, rank * len(parts)
    seen = made.narrow(dim, 0, columns)
    if len(parts) > 1:
        seen = torch.unflatten(seen, dim, (len(parts), rank)).sum(dim=dim)
    if adapters > 1:
        seen = torch.unflatten(seen, dim, (adapters, -1))
        seen = (seen.transpose(1, 2) if axis == "output" else seen).flatten(0, 1)
    return seen, made.select(dim, columns)


def _batch(
    weights: Sequence[Tensor], rows: Sequence[Tensor], axis: NormAxis, dtype: torch.dtype
) -> Tensor:
    """The product of each weight with its rows, float32 or wider, in one tensor."""
    # One weight after the other: of a quantised one this is a dense matrix.
    pairs = (
        (weight.flatten(1), row.t()) if axis == "output" else (row, weight.flatten(1))
        for weight, row in zip(weights, rows, strict=True)
    )
    if dtype in (torch.float32, torch.float64):
        products = [left.to(dtype) @ right.to(dtype) for left, right in pairs]
        return torch.stack(products) if len(products) > 1 else products[0][None]
    out, width = weights[0].shape[0], weights[0][0].numel()
    shape = (out, len(rows[0])) if axis == "output" else (len(rows[0]), width)
    made = torch.empty(len(weights), *shape, dtype=torch.float32, device=weights[0].device)
    for pair, place in zip(pairs, made.unbind(), strict=True):
        torch.ops.aten.mm.dtype_out(*pair, torch.float32, out=place)
    return made


def widens(weight: Tensor) -> bool:
    """Return whether products of this weight can be float32 without a copy of it that is."""
    # float16 has too few exponents to hold the parts of a factor.
    return weight.dtype == torch.bfloat16 and widens_products(weight.device.type)


def widens_products(device_type: str) -> bool:
    """Return whether a product of bfloat16 matrices can be float32 on this kind of device."""
    return device_type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")


def parts_of(factor: Tensor) -> list[Tensor]:
    """Three bfloat16 tensors whose sum is the float32 one, to its last bit."""
    high = factor.to(torch.bfloat16)
    rest = factor - high
    middle = rest.to(torch.bfloat16)
    return [high, middle, (rest - middle).to(torch.bfloat16)]


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
    wide_down, wide_up = (t.to(upcast_dtype(weight)).flatten(1)[None] for t in (down, up))
    seen = wide_down if axis == "output" else wide_up
    parts = parts_of(seen) if widens(weight) else [seen]
    terms = norm_terms([weight], wide_down, wide_up, scale, axis, parts)
    total = base + terms.change[0]
    cancelled = is_ill_conditioned(total, base, terms.bound[0]).nonzero().flatten()
    if len(cancelled):
        if axis == "output":
            weight, up = weight[cancelled], up[cancelled]
        else:
            weight, down = weight[:, cancelled], down[:, cancelled]
        total[cancelled] = exact_squared_norm(weight, down, up, scale, axis).to(total)
    return total.sqrt()


def exact_squared_norm(
    weight: Tensor, down: Tensor, up: Tensor, scale: float, axis: NormAxis
) -> Tensor:
    """``|W + s B A|^2`` per channel from the dense sum in float64: ``(out,)`` or ``(in,)``."""
    dense = to_float64(weight) + low_rank_delta(to_float64(down), to_float64(up), scale)
    return squared_norm(dense, axis)


def is_ill_conditioned(total: Tensor, base: Tensor, bound: Tensor, margin: float = 1.0) -> Tensor:
    """Flag where ``|W + sBA|^2`` is lost in the rounding of the terms that it was summed from.

    Their magnitudes are no more than ``(|W| + |sBA|)^2`` in sum (Cauchy-Schwarz), and rounding is a
    share of these, whatever is left of them: ``|W|^2`` against the change, or rank against rank.

    Args:
        total: ``|W + sBA|^2`` per channel, as summed.
        base: ``|W|^2``.
        bound: `Terms.bound`.
        margin: More than 1 finds channels that only come near to that.
    """
    return total < margin * CANCELLATION * (base.sqrt() + bound).square()


def checksum(weight: Tensor, axis: NormAxis) -> Tensor:
    """A number per channel that tells a weight from another: ``(out,)`` or ``(in,)``.

    It is the product with a fixed unit vector, of about ``|W_i| / sqrt(n)``, to which a difference
    between two weights would have to be orthogonal in all channels to go unseen.
    """
    rows = upcast(weight).flatten(1)
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
    # A chirp: as good as random, and the same everywhere, in bfloat16 too.
    chirp = torch.arange(length, dtype=torch.float64, device="cpu").square().cos()
    unit = torch.div(chirp, torch.linalg.vector_norm(chirp)).bfloat16()
    return unit[None].to(device, dtype)
