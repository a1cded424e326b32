"""What a DoRA layer needs that follows from its parameters alone: the norm and the gain.

The norm is detached (paper, section 4.3), so both are computed once per optimizer step, outside of
the graph, and reused over gradient accumulation, checkpoint recomputation, guidance and all of
sampling. For all layers together: on small vectors an operation's fixed price is the whole price,
and on a GPU each read back to the host is a wait.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from dora_diffusion.numerics.dora import gain as gain_of
from dora_diffusion.numerics.dora import squared_norm, weight_norm
from dora_diffusion.numerics.fast.norms import (
    change_and_checksum,
    checksum,
    factored_norm,
    is_ill_conditioned,
)
from dora_diffusion.numerics.precision import full_precision, wide
from dora_diffusion.numerics.weights import NormAxis

# Output channels whose |g| is below this recompute their direction for the gradient of m: dividing
# g out of y would magnify the rounding of y, or be 0 / 0.
SMALL_GAIN = 1e-3
# Checksums of one weight differ by their rounding, of about 1e-6 |W_i|; this is squared.
SAME_WEIGHT = 1e-10


class Gain(NamedTuple):
    """What follows from the parameters alone, once per optimizer step. No gradient flows through.

    Attributes:
        norm: ``norm(W + sBA)``, ``(n,)``, float32.
        gain: ``g = m / norm``, ``(n,)``, float32.
        small: Indices of the channels with ``|g| < SMALL_GAIN``; None where there are none.
    """

    norm: Tensor
    gain: Tensor
    small: Tensor | None


class WeightStatistics:
    """Statistics of a frozen base weight ``(out, in, *k)``; both ``(n,)`` on the norm's axis.

    Attributes:
        squared_norm: ``|W|^2``.
        checksum: Tells whether it is still the same weight.
    """

    def __init__(self, weight: Tensor, axis: NormAxis) -> None:
        self.axis: NormAxis = axis
        self.update(weight)

    def update(self, weight: Tensor) -> None:
        """Compute the statistics of a weight, which are a pass over it each."""
        with full_precision(weight.device):
            self.squared_norm = squared_norm(weight, self.axis)
            self.checksum = checksum(weight, self.axis)


class GainInputs(NamedTuple):
    """What one adapter's gain is computed from; shapes as in `factored_norm`."""

    magnitude: Tensor
    weight: Tensor
    down: Tensor
    up: Tensor
    scale: float
    axis: NormAxis
    statistics: WeightStatistics


def make_gain(magnitude: Tensor, norm: Tensor) -> Gain:
    """The gain of an adapter from its magnitude and norm, both ``(n,)``."""
    gain = gain_of(magnitude.detach(), norm)
    small = (gain.abs() < SMALL_GAIN).nonzero().flatten()
    return Gain(norm, gain, small if len(small) else None)


@torch.no_grad()
def make_gains(layers: Sequence[GainInputs]) -> list[Gain]:
    """The gains of many layers, with one wait for the device in all, not one for each layer.

    A layer with an ill-conditioned channel (whose terms cancel, or whose gain is small) takes a
    path of its own; whether there is any is all that is read back from the device. So does a layer
    whose weight has changed: no version counter sees a base weight that is written through
    ``.data``, but its checksum does.
    """
    if not layers:
        return []
    if len({(layer.weight.device, layer.statistics.squared_norm.dtype) for layer in layers}) > 1:
        return [gain for layer in layers for gain in make_gains([layer])]
    # Neighbours of one kind are concatenated, and share operations.
    order = sorted(range(len(layers)), key=lambda i: _kind(layers[i]))
    with full_precision(layers[0].weight.device):
        gains = _make_together([layers[i] for i in order])
    return [gain for _, gain in sorted(zip(order, gains, strict=True), key=lambda pair: pair[0])]


def _kind(layer: GainInputs) -> tuple[NormAxis, int]:
    return layer.axis, layer.up.shape[1]


def _make_together(layers: Sequence[GainInputs]) -> list[Gain]:
    sizes = [len(layer.statistics.squared_norm) for layer in layers]
    base = torch.cat([layer.statistics.squared_norm for layer in layers])
    recorded = torch.cat([layer.statistics.checksum for layer in layers])
    changes, checksums = zip(*(change_and_checksum(*layer[1:6]) for layer in layers), strict=True)
    total = torch.cat(changes).add_(base)
    norm = total.sqrt()
    gain = gain_of(torch.cat([layer.magnitude for layer in layers]), norm)
    # Not less: a negative total has no root, and its channel must be found too.
    flagged = is_ill_conditioned(total, base, _bound(layers)).logical_or_(
        ~(gain.abs() >= SMALL_GAIN)
    )
    flagged |= (torch.cat(checksums) - recorded).square() > SAME_WEIGHT * base
    gains = [
        Gain(*pair, None)
        for pair in zip(torch.split(norm, sizes), torch.split(gain, sizes), strict=True)
    ]
    # The one read back of a step. `nonzero` on the device would wait for it as well, to learn how
    # many there are, and the owners would be a second wait.
    for number in _owners(flagged.cpu().nonzero().flatten().tolist(), sizes):
        gains[number] = _recomputed(layers[number])
    return gains


def _bound(layers: Sequence[GainInputs]) -> Tensor:
    """`low_rank_bound` of all channels of all layers, in few operations."""
    others = [layer.down if layer.axis == "output" else layer.up for layer in layers]
    # One launch for all layers: the factors are so small that launches are what they cost.
    norms = torch._foreach_norm([wide(factor) for factor in others])
    torch._foreach_mul_(norms, [abs(layer.scale) for layer in layers])
    factor_norms = torch.cat(
        [
            norm.expand(len(layer.statistics.squared_norm))
            for norm, layer in zip(norms, layers, strict=True)
        ]
    )
    channel_norms: list[Tensor] = []
    for (axis, _), group in groupby(layers, key=_kind):
        if axis == "input":
            channel_norms += [weight_norm(wide(layer.down), axis) for layer in group]
        else:
            rows = torch.cat([wide(layer.up).flatten(1) for layer in group])
            channel_norms.append(weight_norm(rows, axis))
    return torch.cat(channel_norms).mul_(factor_norms)


def _recomputed(layer: GainInputs) -> Gain:
    layer.statistics.update(layer.weight)
    return make_gain(layer.magnitude, factored_norm(*layer[1:6], layer.statistics.squared_norm))


def _owners(channels: Sequence[int], sizes: Sequence[int]) -> set[int]:
    """Which layers the channels of the concatenated vector belong to."""
    ends = list(accumulate(sizes))
    return {bisect_right(ends, channel) for channel in channels}
