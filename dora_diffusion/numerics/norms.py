"""``norm(W + s B A)`` through the rank, without building ``W + s B A``.

    |W + sBA|^2 = |W|^2 + 2s <W, BA> + s^2 |BA|^2

``|W|^2`` is constant, and the other two terms need a product of the weight with a factor of width
r. If the terms of a channel nearly cancel, their sum is inaccurate in float32, and the norm is
recomputed from the dense weight.

Layers of the same shape are computed together. Except for products with the weights, each operation
processes all of them.
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

# Below this ratio of the squared norm to its terms' magnitudes, the error of the factored norm may
# exceed 1e-5, and the channel is recomputed from the dense weight. The measured rounding error of
# the terms is up to ten times 2^-24.
CANCELLATION = 1 / 32


class Terms(NamedTuple):
    """Terms of the norms of layers with the same shape, each ``(n, channels)``.

    Attributes:
        change: ``|W + sBA|^2 - |W|^2``.
        bound: Upper bound of ``|sBA|`` per channel, regardless of cancellation between ranks:
            ``|s| |B_i| |A|`` per output, ``|s| |A_j| |B|`` per input.
        checksum: `checksum` of each weight, from the same pass over the weights.
    """

    change: Tensor
    bound: Tensor
    checksum: Tensor


def norm_terms(
    weights: Sequence[Tensor], down: Tensor, up: Tensor, s: float, axis: NormAxis,
    multipliers: Sequence[Tensor],
) -> Terms:  # fmt: skip
    """Compute the terms of the factored norms of n layers with the same weight shape and dtype.

    Per output, with ``M = 2s W A' + s^2 B A A'``, the change is the row sum of ``B * M``. Per
    input, A and B exchange roles. Each layer may have K adapters; A and B then have n K entries,
    with the adapters of a layer next to each other.

    Args:
        weights: Base weights ``(out, in, *k)``.
        down: ``A``, ``(n, r, in * k)``, float32 (float64 for float64 weights).
        up: ``B``, ``(n, out, r)``, in the same precision.
        s: The scale.
        axis: Norm axis.
        multipliers: Factor to multiply the weights with, A on the output axis or B on the input
            axis: the factor itself, or its `parts_of` if `widens` is true for the weights.
    """
    if axis == "output":
        # The checksum is an additional column of the product, which saves a pass over the weight.
        seen, checksum = _products(weights, multipliers, "output")
        gram = torch.bmm(down, down.mT)
        change = torch.baddbmm(seen, up, gram, beta=2 * s, alpha=s * s).mul_(up).sum(dim=2)
        channel_norms = torch.linalg.vector_norm(up, dim=2)
        total_norm = torch.linalg.vector_norm(down, dim=(1, 2))
    else:
        inputs = weights[0].shape[1]
        seen, sums = _products(weights, [part.mT for part in multipliers], "input")
        gram = torch.bmm(up.mT, up)
        product = torch.baddbmm(seen, gram, down, beta=2 * s, alpha=s * s).mul_(down)
        # (n, r, in * k) -> (n, in): sum over the ranks and the taps of a convolution.
        change = torch.unflatten(product, 2, (inputs, -1)).sum(dim=(1, 3))
        channel_norms = torch.linalg.vector_norm(torch.unflatten(down, 2, (inputs, -1)), dim=(1, 3))
        total_norm = torch.linalg.vector_norm(up, dim=(1, 2))
        checksum = torch.unflatten(sums, 1, (inputs, -1)).sum(dim=2)
    bound = channel_norms.mul_(total_norm[:, None])
    return Terms(change, bound if s == 1 else bound.mul_(abs(s)), checksum)


def _products(
    weights: Sequence[Tensor], multipliers: Sequence[Tensor], axis: NormAxis
) -> tuple[Tensor, Tensor]:
    """Multiply each weight by its factor and by the probe of the checksum.

    Args:
        weights: n weights ``(out, in, *k)``.
        multipliers: Summands of the factors, each ``(n, r, in * k)`` on the output axis and
            ``(n, r, out)`` on the input axis.
        axis: Norm axis.

    Returns:
        ``(n, out, r)`` and ``(n, out)``, or ``(n, r, in * k)`` and ``(n, in * k)``.
    """
    count, length = len(weights), multipliers[0].shape[2]
    adapters = len(multipliers[0]) // count
    if adapters > 1:  # The factors of one weight are columns of one product.
        multipliers = [part.reshape(count, -1, length) for part in multipliers]
    rank = multipliers[0].shape[1]
    probe = _probe(length, multipliers[0]).expand(count, 1, length)
    products = _batch(weights, torch.cat([*multipliers, probe], dim=1), axis)
    dim, columns = 2 if axis == "output" else 1, rank * len(multipliers)
    seen = products.narrow(dim, 0, columns)
    if len(multipliers) > 1:
        seen = torch.unflatten(seen, dim, (len(multipliers), rank)).sum(dim=dim)
    if adapters > 1:
        seen = torch.unflatten(seen, dim, (adapters, -1))
        seen = (seen.transpose(1, 2) if axis == "output" else seen).flatten(0, 1)
    return seen, products.select(dim, columns)


def _batch(weights: Sequence[Tensor], rows: Tensor, axis: NormAxis) -> Tensor:
    """Multiply each weight by its rows, in float32 or float64, in one tensor."""
    wide, on_output = upcast_dtype(rows), axis == "output"
    out, width = len(weights[0]), weights[0].shape[1:].numel()
    shape = (out, rows.shape[1]) if on_output else (rows.shape[1], width)
    products = torch.empty(len(weights), *shape, dtype=wide, device=rows.device)
    factors = (rows.mT if on_output else rows).unbind()
    for weight, factor, product in zip(weights, factors, products.unbind(), strict=True):
        # Quantised weights are dense in memory one at a time.
        matrix = weight if weight.ndim == 2 else weight.flatten(1)
        if rows.dtype == wide:
            matrix = matrix.to(wide)
            torch.mm(*((matrix, factor) if on_output else (factor, matrix)), out=product)
        else:
            pair = (matrix, factor) if on_output else (factor, matrix)
            torch.ops.aten.mm.dtype_out(*pair, wide, out=product)
    return products


def widens(weight: Tensor) -> bool:
    """Return whether products of a weight can be float32 without a float32 copy of the weight."""
    # The exponent range of float16 is too small for the summands of a factor.
    return weight.dtype == torch.bfloat16 and widens_products(weight.device.type)


def widens_products(device_type: str) -> bool:
    """Return whether a kind of device can multiply bfloat16 matrices to a float32 result."""
    return device_type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")


def parts_of(factor: Tensor) -> list[Tensor]:
    """Split a float32 tensor into three bfloat16 tensors whose sum equals it exactly."""
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
    """Compute ``norm(W + s B A)`` per channel without ``W + s B A``: ``(out,)`` or ``(in,)``.

    Channels whose terms nearly cancel are recomputed from the dense sum.

    Args:
        weight: Base weight ``(out, in, *k)``.
        down: ``A``, ``(r, in, *k)``.
        up: ``B``, ``(out, r)`` or ``(out, r, 1, 1)``.
        scale: ``s = alpha / r``.
        axis: Norm axis.
        weight_squared_norm: ``squared_norm(weight, axis)``. Default: it is computed.
    """
    base = squared_norm(weight, axis) if weight_squared_norm is None else weight_squared_norm
    wide_down, wide_up = (t.to(upcast_dtype(weight)).flatten(1)[None] for t in (down, up))
    seen = wide_down if axis == "output" else wide_up
    multipliers = parts_of(seen) if widens(weight) else [seen]
    terms = norm_terms([weight], wide_down, wide_up, scale, axis, multipliers)
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
    """Compute ``|W + s B A|^2`` per channel from the dense sum in float64."""
    dense = to_float64(weight) + low_rank_delta(to_float64(down), to_float64(up), scale)
    return squared_norm(dense, axis)


def is_ill_conditioned(total: Tensor, base: Tensor, bound: Tensor, margin: float = 1.0) -> Tensor:
    """Return the channels in which ``|W + sBA|^2`` is inaccurate because its terms nearly cancel.

    The magnitudes of all terms sum to at most ``(|W| + |sBA|)^2`` (Cauchy-Schwarz). The rounding
    error is proportional to this bound, not to the sum that remains.

    Args:
        total: ``|W + sBA|^2`` per channel, as the sum of its terms.
        base: ``|W|^2``.
        bound: `Terms.bound`.
        margin: Factor of the threshold. Above 1, channels close to the threshold are included.
    """
    return total < margin * CANCELLATION * (base.sqrt() + bound).square()


def checksum(weight: Tensor, axis: NormAxis) -> Tensor:
    """Compute a checksum per channel that identifies a weight: ``(out,)`` or ``(in,)``.

    It is the product with a fixed unit vector, of about ``|W_i| / sqrt(n)``. A difference between
    two weights goes undetected only if it is orthogonal to this vector in all channels.
    """
    rows = upcast(weight).flatten(1)
    if axis == "output":
        return rows.mv(_probe(rows.shape[1], rows)[0])
    columns = rows.t().mv(_probe(rows.shape[0], rows)[0])
    return columns.view(weight.shape[1], -1).sum(dim=1)


def _probe(length: int, like: Tensor) -> Tensor:
    """Return the unit vector of the checksum, ``(1, length)``."""
    probe = _probe_on(length, like.device, like.dtype)
    if type(probe) is not Tensor:
        _probe_on.cache_clear()  # A fake tensor must not outlive its mode.
    return probe


@lru_cache(maxsize=256)
def _probe_on(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # A chirp behaves like random values, but is the same everywhere, also in bfloat16.
    chirp = torch.arange(length, dtype=torch.float64, device="cpu").square().cos()
    unit = torch.div(chirp, torch.linalg.vector_norm(chirp)).bfloat16()
    return unit[None].to(device, dtype)
