"""The DoRA formula: norms on either axis, the gain, and the adapted weight.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, section 4.
PyTorch weights are ``(out, in, *k)``; with ``delta = s * B @ A``

    W' = m * (W + delta) / norm(W + delta),        m starts as norm(W).

Everything here is computed in float32 (float64 for float64 weights), whatever the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dora_diffusion.numerics.precision import wide, wide_dtype
from dora_diffusion.numerics.product import matrix_product
from dora_diffusion.numerics.weights import LayerWeights, NormAxis

# Far below any pretrained norm, and far enough above float32's smallest number that m / FLOOR
# stays finite. A channel of a smaller norm is 0. Never added, so no norm is changed.
NORM_FLOOR = 1e-30
# Below this share of its terms' magnitudes, the factored norm may be off by more than 1e-5, and the
# channel is recomputed from the dense weight: the terms were seen to be rounded to up to ten times
# 2^-24 of them.
CANCELLATION = 1 / 32


def per_channel(vector: Tensor, ndim: int, axis: NormAxis) -> Tensor:
    """Shape ``(n,)`` to broadcast along the output or the input axis of an ``ndim`` weight."""
    return vector.view(-1, *[1] * (ndim - 1) if axis == "output" else [1] * (ndim - 2))


def squared_norm(weight: Tensor, axis: NormAxis) -> Tensor:
    """Squared L2 norm per output or input channel: ``(out, in, *k)`` -> ``(out,)`` or ``(in,)``.

    The output axis is what the authors' code and PEFT use; the input axis is the paper's formula
    as printed (a column of ``W`` in R^{d x k}).
    """
    if axis == "input":
        # Added row by row, since torch is several times slower and less exact across rows.
        columns = wide(weight).flatten(1).square().sum(dim=0)
        return columns.view(weight.shape[1], -1).sum(dim=1)
    # One pass over the weight in its own dtype, summed in the wide one.
    dims = list(range(1, weight.ndim))
    norm: Tensor = torch.linalg.vector_norm(weight, dim=dims, dtype=wide_dtype(weight))
    return norm.square()


def weight_norm(weight: Tensor, axis: NormAxis) -> Tensor:
    """L2 norm per channel, the magnitude of a fresh adapter: ``(out,)`` or ``(in,)``."""
    return squared_norm(weight, axis).sqrt()


def low_rank_delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``s * B @ A`` in the weight's shape: ``(r, in, *k), (out, r, ...)`` -> ``(out, in, *k)``."""
    product = (scale * wide(up).flatten(1)) @ wide(down).flatten(1)
    return product.view(up.shape[0], *down.shape[1:])


def adapted_norm(
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
    reach = low_rank_reach(down, up, scale, axis)
    cancelled = cancels(total, base, reach).nonzero().flatten()
    if len(cancelled):
        dense = _dense_channels(weight, down, up, scale, axis, cancelled)
        total[cancelled] = squared_norm(dense, axis).to(total.dtype)
    return total.sqrt()


def low_rank_reach(down: Tensor, up: Tensor, scale: float, axis: NormAxis) -> Tensor:
    """``|s| |B_i| |A|`` per output, ``|s| |A_j| |B|`` per input: ``(out,)`` or ``(in,)``.

    At least the norm of that channel of ``s B A``, however its ranks cancel one another.
    """
    own, other = (up, down) if axis == "output" else (down, up)
    size: Tensor = torch.linalg.vector_norm(wide(other))
    return abs(scale) * size * weight_norm(wide(own), axis)


def cancels(total: Tensor, base: Tensor, reach: Tensor) -> Tensor:
    """Where ``|W + sBA|^2`` is lost in the rounding of the terms that it was summed from.

    Their magnitudes are no more than ``(|W| + reach)^2`` in sum (Cauchy-Schwarz), and rounding is a
    share of these, whatever is left of them: ``|W|^2`` against the change, or rank against rank.

    Args:
        total: ``|W + sBA|^2`` per channel, as summed.
        base: ``|W|^2``.
        reach: `low_rank_reach`.
    """
    return total < CANCELLATION * (base.sqrt() + reach).square()


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
    return weight.double() + low_rank_delta(down.double(), up.double(), scale)


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``g = m / norm``, which a channel of the direction is multiplied by; 0 where that is 0."""
    quotient = wide(magnitude) / norm.clamp_min(NORM_FLOOR)
    return quotient.masked_fill(norm <= NORM_FLOOR, 0.0)


def moved_magnitude(weight: Tensor, layer: LayerWeights, magnitude_strength: float) -> Tensor:
    """The magnitude, moved by a share of its change from ``norm(W)``; 1 returns it unchanged."""
    assert layer.magnitude is not None
    magnitude = wide(layer.magnitude)
    if magnitude_strength == 1.0:
        return magnitude
    start = weight_norm(weight, layer.norm_axis)
    return start + magnitude_strength * (magnitude - start)


def adapted_weight(
    weight: Tensor,
    layer: LayerWeights,
    *,
    strength: float = 1.0,
    direction_strength: float = 1.0,
    magnitude_strength: float = 1.0,
) -> Tensor:
    """The weight that a merge writes, ``W + strength * (W' - W)``, in float32.

    Args:
        weight: Base weight ``(out, in, *k)``, any floating dtype.
        layer: The adapter of this layer.
        strength: 0 gives exactly ``W``, 1 exactly ``W'``.
        direction_strength: Scales ``delta`` before the norm is taken.
        magnitude_strength: Moves ``m`` by this share of its change from ``norm(W)``.

    Raises:
        ValueError: If the layer is not for a weight of this shape.
    """
    if layer.weight_shape != tuple(weight.shape):
        raise ValueError(
            f"the adapter is for a weight of shape {layer.weight_shape}, "
            f"the base has {tuple(weight.shape)}"
        )
    base = wide(weight)
    # In place from here on: at the size of a model, fresh memory costs more than the arithmetic.
    down, up = (tensor.to(base.dtype) for tensor in (layer.down, layer.up))
    adapted = low_rank_delta(down, up, direction_strength * layer.scale).add_(base)
    if layer.magnitude is not None:
        norm = weight_norm(adapted, layer.norm_axis)
        factor = gain(moved_magnitude(base, layer, magnitude_strength), norm)
        adapted.mul_(per_channel(factor, weight.ndim, layer.norm_axis))
    return adapted if strength == 1.0 else adapted.sub_(base).mul_(strength).add_(base)


def merged_weight(weight: Tensor, adapted: Sequence[Tensor]) -> Tensor:
    """Several adapters on one base: ``W + sum_k (W'_k - W)``, in float32.

    Every difference is taken from the unmerged base. They are summed in float64, so that the order
    of the adapters does not matter.
    """
    if len(adapted) == 1:
        return adapted[0]
    base = weight.double()
    return wide(sum((one.double() - base for one in adapted), base).to(wide(weight).dtype))
