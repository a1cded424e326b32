"""Factors of a layer, computed from its parameters: by a plan for many layers, or for one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dora_diffusion.numerics.dora import (
    adapted_norm,
    adapted_weight,
    gain,
    interpolated_magnitude,
    per_channel,
    squared_norm,
)
from dora_diffusion.numerics.norms import checksum
from dora_diffusion.numerics.precision import full_precision
from dora_diffusion.numerics.weights import Factors, LayerWeights, NormAxis

Rows = int | tuple[int, ...]
"""The adapter of each row of a batch, of K: a number where all rows have one."""


class RowShard(NamedTuple):
    """Rows (outputs) of a sharded weight that this process has.

    Squared norms are complete without any process having the whole weight: on the output axis each
    knows those of its rows, on the input axis each has a part of every sum.

    Attributes:
        start: The first of them.
        length: How many.
        out: Rows of the whole weight.
        add_up: A tensor's sum over all processes, the same bits in each.
    """

    start: int
    length: int
    out: int
    add_up: Callable[[Tensor], Tensor]

    def own(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The part of a tensor over all rows that belongs to those of this process."""
        return tensor.narrow(dim, self.start, self.length)

    def summand(self, values: Tensor, axis: NormAxis) -> Tensor:
        """Return this process's term of `add_up`, from ``(..., length)`` or ``(..., in)``."""
        if axis == "input":
            return values
        whole = values.new_zeros(*values.shape[:-1], self.out)
        self.own(whole, -1).copy_(values)
        return whole


class WeightStatistics:
    """Statistics of a frozen base weight ``(out, in, *k)``; both ``(n,)`` on the norm's axis.

    Attributes:
        squared_norm: ``|W|^2``.
        checksum: Tells whether it is still the same weight.

    Args:
        weight: Of a sharded one, the rows of this process.
        axis: The norm's.
        shard: Which rows these are. All processes make, and update, the same ones.
    """

    def __init__(self, weight: Tensor, axis: NormAxis, shard: RowShard | None = None) -> None:
        self.axis: NormAxis = axis
        self.shard = shard
        self.update(weight)

    def update(self, weight: Tensor) -> None:
        """Compute the statistics of a weight, which are a pass over it each."""
        with full_precision(weight.device):
            both = squared_norm(weight, self.axis), checksum(weight, self.axis)
            if self.shard is not None:
                summed = self.shard.add_up(self.shard.summand(torch.stack(both), self.axis))
                both = summed[0], summed[1]
            self.squared_norm, self.checksum = both


class Site(NamedTuple):
    """A layer and its K adapters: all DoRA on one norm axis, or all LoRA.

    Attributes:
        weight: Base weight ``(out, in, *k)``; of a sharded one, the rows of this process.
        bias: ``(out,)``, or None.
        adapters: Their parameters, with what acts as direction and magnitude where strengths move
            these.
        statistics: Of the weight; None of a LoRA.
        keep_output: Whether nothing overwrites the layer's output in place.
        shard: Which rows of the weight there are; None: all.
    """

    weight: Tensor
    bias: Tensor | None
    adapters: Sequence[LayerWeights]
    statistics: WeightStatistics | None = None
    keep_output: bool = True
    shard: RowShard | None = None

    @property
    def rank(self) -> int:
        """The greatest of its adapters, which others are filled up to with zeros."""
        return max(adapter.rank for adapter in self.adapters)

    @property
    def out(self) -> int:
        """Rows of the whole weight."""
        return len(self.weight) if self.shard is None else self.shard.out

    @property
    def width(self) -> int:
        """Number of magnitudes of an adapter."""
        first = self.adapters[0]
        return 0 if first.magnitude is None else len(first.magnitude)

    @property
    def is_direct(self) -> bool:
        """True if the gradient of m cannot come from what the layer keeps; see `Factors`."""
        first = self.adapters[0]
        if first.magnitude is None:
            return False
        if first.norm_axis == "output":
            return not self.keep_output
        # Ids have no activation, and a magnitude of a grouped convolution scales several channels.
        return first.kind == "embedding" or first.groups > 1


def factors_of(
    weight: Tensor,
    bias: Tensor | None,
    layer: LayerWeights,
    dtype: torch.dtype,
    magnitude_strength: float = 1.0,
    norm: Tensor | None = None,
) -> Factors:
    """The factors of one layer by itself, by plain autograd.

    Args:
        weight: Base weight ``(out, in, *k)``.
        bias: ``(out,)``, or None.
        layer: The adapter.
        dtype: To compute in.
        magnitude_strength: See `interpolated_magnitude`.
        norm: ``norm(W + s B A)``, if already computed.
    """
    down, up = layer.down.to(dtype), layer.scale * layer.up
    if layer.magnitude is None:
        return Factors(down, up.to(dtype))
    norm = adapted_norm(weight, layer) if norm is None else norm
    g = gain(interpolated_magnitude(weight, layer, magnitude_strength), norm)
    constant, axis, shift = g.detach(), layer.norm_axis, None
    if axis == "output":
        up = per_channel(constant, up.ndim, axis) * up
        shift = None if bias is None else ((1 - constant) * bias).to(dtype)
    made = direction_of(weight, layer, dtype)
    return Factors(down, up.to(dtype), g, shift, None, axis, True, made)


@torch.no_grad()
def direction_of(weight: Tensor, layer: LayerWeights, dtype: torch.dtype) -> Tensor | None:
    """Compute `Factors.direction` of a direct layer."""
    if layer.norm_axis == "input":
        return None
    return adapted_weight(weight, dataclasses.replace(layer, magnitude=None)).to(dtype)
