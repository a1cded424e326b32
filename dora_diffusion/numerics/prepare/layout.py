"""Where the parameters of many layers lie, so that an operation serves all of them, and flags.

Everything of one kind lies in one buffer: all A one after the other, all B of one rank as rows, and
all vectors. Layers of one shape are neighbours there. It follows from shapes and settings alone, so
that a loop makes it once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, groupby
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dora_diffusion.numerics.prepare.factors import PlanInputs

# Devices whose flags are read a step late.
_DEFERRED = {"cuda"}


@torch.no_grad()
def join(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of any shapes, at least one, one after the other in a new vector."""
    joined: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return joined.clone() if len(tensors) == 1 else joined


@torch.no_grad()
def split_like(joined: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """What `join` made of tensors of these shapes, as views of it in these shapes."""
    parts: Sequence[Tensor] = _unflatten_dense_tensors(joined.detach(), tensors)  # type: ignore[no-untyped-call]
    # An empty one has the shape (0,) with torch 2.6.
    return [p if p.numel() else p.view(t.shape) for p, t in zip(parts, tensors, strict=True)]


class Layout:
    """Layers of one device and precision, in an order in which those of one shape are neighbours.

    All of their weights are sharded, or none.

    Attributes:
        layers: In that order.
        numbers: The place of each among those that were given.
        dtype: The dtype of norms, gains and buffers.
        sizes: How many magnitudes each has.
        biases: What its gain has to spare: its bias, on the output axis, where there is one.
        groups: Neighbours of one rank and axis, whose B are rows of one matrix.
        shapes: Neighbours of one shape, rank, axis, scale and dtype.
    """

    def __init__(self, layers: Sequence[PlanInputs], numbers: Sequence[int]) -> None:
        self.numbers = sorted(numbers, key=lambda number: _kind(layers[number]))
        self.layers = layers = [layers[number] for number in self.numbers]
        self.dtype = layers[0].statistics.squared_norm.dtype
        self.sizes = [layer.magnitude.shape[0] for layer in layers]
        self.biases = [
            layer.bias if layer.weights.norm_axis == "output" else None for layer in layers
        ]
        self.groups = [list(group) for _, group in groupby(layers, key=_rank_and_axis)]
        self.shapes = [list(group) for _, group in groupby(layers, key=_kind)]
        self._downs = [layer.weights.down for layer in layers]
        self._ups = [[layer.weights.up for layer in group] for group in self.groups]
        self._scales = [_scales(group) for group in self.groups]

    def down(self) -> Tensor:
        """All A."""
        return join(self._downs).to(self.dtype)

    def up(self) -> list[Tensor]:
        """All B, ``(rows, r)`` of each group."""
        return [join(ups).to(self.dtype).view(-1, ups[0].shape[1]) for ups in self._ups]

    def downs(self, joined: Tensor) -> Sequence[Tensor]:
        """Each layer's part of what is laid out as A."""
        return split_like(joined, self._downs)

    def ups(self, joined: Sequence[Tensor]) -> list[Tensor]:
        """Each layer's part of what is laid out as B."""
        parts: list[Tensor] = []
        for rows, ups in zip(joined, self._ups, strict=True):
            parts += split_like(rows.view(-1), ups)
        return parts

    def stacked_downs(self, joined: Tensor) -> list[Tensor]:
        """The A of each of `shapes`, ``(n, r, in * k)``."""
        stacks = [(len(layers), *layers[0].weights.down.flatten(1).shape) for layers in self.shapes]
        parts = torch.split(joined, [prod(stack) for stack in stacks])
        return [part.view(stack) for part, stack in zip(parts, stacks, strict=True)]

    def stacked_ups(self, joined: Sequence[Tensor]) -> list[Tensor]:
        """The B of each of `shapes`, ``(n, out, r)``."""
        made: list[Tensor] = []
        for rows, (_, group) in zip(joined, groupby(self.shapes, key=_group), strict=True):
            stacks = [(len(layers), len(layers[0].weights.up)) for layers in group]
            parts = torch.split(rows, [prod(stack) for stack in stacks])
            made += [part.view(*stack, -1) for part, stack in zip(parts, stacks, strict=True)]
        return made

    def vectors(self, joined: Tensor) -> Sequence[Tensor]:
        """Each layer's part of a vector over all channels."""
        return torch.split(joined, self.sizes)

    def up_scales(self, gain: Tensor) -> list[Tensor]:
        """The factor of each row of B, ``(rows, 1)`` of each group: ``g s``, or ``s``."""
        made, start = [], 0
        for group, scale in zip(self.groups, self._scales, strict=True):
            end = start + sum(layer.magnitude.shape[0] for layer in group)
            on_output = group[0].weights.norm_axis == "output"
            factor = gain[start:end, None] if on_output else gain.new_ones(1, 1)
            made.append(factor * (scale if isinstance(scale, float) else scale.to(gain)))
            start = end
        return made


def layouts_of(layers: Sequence[PlanInputs]) -> list[Layout]:
    """One for each device and precision; sharded weights apart."""
    kinds: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for number, layer in enumerate(layers):
        is_whole = layer.shard is None
        kind = (layer.weight.device, layer.statistics.squared_norm.dtype, is_whole)
        kinds.setdefault(kind, []).append(number)
    return [Layout(layers, numbers) for numbers in kinds.values()]


def _scales(group: Sequence[PlanInputs]) -> Tensor | float:
    """``s`` of each row of a group's B: a number, or, where layers differ, ``(rows, 1)``."""
    scales = [layer.weights.scale for layer in group]
    if len(set(scales)) == 1:
        return scales[0]
    rows = torch.tensor([len(layer.weights.up) for layer in group])
    return torch.tensor(scales, dtype=torch.float64).repeat_interleave(rows)[:, None]


def _rank_and_axis(layer: PlanInputs) -> tuple[int, str]:
    return layer.weights.rank, layer.weights.norm_axis


def _group(layers: Sequence[PlanInputs]) -> tuple[int, str]:
    return _rank_and_axis(layers[0])


def _kind(layer: PlanInputs) -> tuple[Any, ...]:
    """What layers have in common whose norms are computed together; layers are sorted by it."""
    weights, dtype = layer.weights, str(layer.weight.dtype)
    # The shape of the whole weight: processes that share it must agree on the order.
    return *_rank_and_axis(layer), weights.weight_shape, weights.scale, dtype


class DeferredFlags:
    """Flags of one step's channels, read in the next step, when they have long arrived.

    On a CPU, where nothing waits, and in the first step they are read at once. For a loop of steps
    in which nothing but its optimizer changes parameters: then a channel comes near to what is
    flagged before it is there. What was written to a base weight through ``.data`` is noticed a
    step late.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, Any, list[int]] | None = None

    def layers(self, flagged: Tensor, sizes: Sequence[int]) -> set[int]:
        """The layers to which flagged channels belong.

        Args:
            flagged: Of all channels, ``(sum of sizes,)`` bool.
            sizes: Channels of each layer.
        """
        before, self._sent = self._sent, None
        # Elsewhere nothing waits, or a copy cannot be waited for without waiting for all else.
        if flagged.device.type not in _DEFERRED:
            return _owners(flagged.cpu(), sizes)
        self._sent = flagged.to("cpu", non_blocking=True), record_event(flagged), list(sizes)
        if before is None or before[2] != list(sizes):
            before = self._sent
        values, event, _ = before
        event.synchronize()
        return _owners(values, sizes)


def record_event(tensor: Tensor) -> Any:
    """An event on the device of a tensor, after what was started there so far."""
    return torch.cuda.current_stream(tensor.device).record_event()


def _owners(flagged: Tensor, sizes: Sequence[int]) -> set[int]:
    """Which layers the flagged channels of the concatenated vector belong to."""
    ends = list(accumulate(sizes))
    return {bisect_right(ends, channel) for channel in flagged.nonzero().flatten().tolist()}
