"""A layer and its adapters, as norms and factors are computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dora_diffusion.adapters.shard import RowShard
from dora_diffusion.numerics.dora import squared_norm
from dora_diffusion.numerics.norms import checksum
from dora_diffusion.numerics.precision import full_precision
from dora_diffusion.numerics.weights import LayerWeights, NormAxis


class WeightStatistics:
    """Statistics of a frozen base weight ``(out, in, *k)``; both ``(n,)`` on the norm's axis.

    Attributes:
        squared_norm: ``|W|^2``.
        checksum: Checksum that detects a change of the weight.

    Args:
        weight: The weight, or this process's rows of a sharded weight.
        axis: Axis of the norm.
        shard: The rows of a sharded weight. All processes must create and update these together.
    """

    def __init__(self, weight: Tensor, axis: NormAxis, shard: RowShard | None = None) -> None:
        self.axis: NormAxis = axis
        self.shard = shard
        self.update(weight)

    def update(self, weight: Tensor) -> None:
        """Compute the statistics, with one pass over the weight for each."""
        with full_precision(weight.device):
            both = squared_norm(weight, self.axis), checksum(weight, self.axis)
            if self.shard is not None:
                summed = self.shard.add_up(self.shard.partial_sum(torch.stack(both), self.axis))
                both = summed[0], summed[1]
            self.squared_norm, self.checksum = both


class Site(NamedTuple):
    """A layer and its K adapters: all DoRA on one norm axis, or all LoRA.

    Attributes:
        weight: Base weight ``(out, in, *k)``, or this process's rows of a sharded weight.
        bias: ``(out,)``, or None.
        adapters: Weights of the adapters, with strengths of direction and magnitude applied.
        statistics: Statistics of the weight; None for LoRA.
        keep_output: Whether nothing overwrites the layer's output in place.
        shard: Rows of a sharded weight; None if it is not sharded.
    """

    weight: Tensor
    bias: Tensor | None
    adapters: Sequence[LayerWeights]
    statistics: WeightStatistics | None = None
    keep_output: bool = True
    shard: RowShard | None = None

    @property
    def rank(self) -> int:
        """Largest rank of the adapters; smaller ones are padded to it with zeros."""
        return max(adapter.rank for adapter in self.adapters)

    @property
    def out(self) -> int:
        """Number of rows of the whole weight."""
        return len(self.weight) if self.shard is None else self.shard.out

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of an adapter's part of a vector of A, of B, and over channels (`Layout`)."""
        ins = self.weight.shape[1:].numel()
        return (self.rank, ins), (self.out, self.rank), (self.width,)

    @property
    def width(self) -> int:
        """Number of magnitudes of an adapter."""
        first = self.adapters[0]
        return 0 if first.magnitude is None else len(first.magnitude)

    @property
    def gain_in_graph(self) -> bool:
        """True if the layer's saved tensors do not give the gradient of m; see `Factors`."""
        first = self.adapters[0]
        if first.magnitude is None:
            return False
        if first.norm_axis == "output":
            return not self.keep_output
        # Ids have no gradient, and a magnitude of a grouped convolution scales several channels.
        return first.kind == "embedding" or first.groups > 1
