"""Where K adapters of the same layers lie in one stack of parameters, and in their own vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.numerics.precision import upcast_dtype
from dora_diffusion.numerics.prepare.factors import WeightStatistics
from dora_diffusion.numerics.weights import LayerWeights

# Of how many ways to lay out the rows of a batch the indices are kept.
_KEPT = 8


class StackedLayer(NamedTuple):
    """A layer with K adapters: all DoRA on one norm axis, or all LoRA.

    Attributes:
        weight: Base weight ``(out, in, *k)``, of no Embedding and no grouped convolution.
        bias: ``(out,)``, or None.
        statistics: Of the weight.
        adapters: Parameters of each.
        keep_output: Whether nothing overwrites the layer's output in place.
    """

    weight: Tensor
    bias: Tensor | None
    statistics: WeightStatistics
    adapters: Sequence[LayerWeights]
    keep_output: bool = True

    @property
    def rank(self) -> int:
        """The greatest of its adapters."""
        return max(adapter.rank for adapter in self.adapters)


class Vector(NamedTuple):
    """All parameters of one adapter, one after the other.

    Attributes:
        parts: Flat tensors, whose concatenation it is.
        offsets: Where each parameter begins, by its identity.
    """

    parts: Sequence[Tensor]
    offsets: Mapping[int, int]

    @property
    def size(self) -> int:
        return sum(part.numel() for part in self.parts)


@dataclass(frozen=True)
class StackedShape:
    """Neighbours of one rank, shape and dtype, and where their parts begin in a row of the stack.

    Attributes:
        layers: Their numbers.
        rank: What ranks are filled up to.
        shape: Of a weight, ``(out, in, *k)``.
        down: Where their A begin.
        up: Where their B begin.
        channels: Where their magnitudes begin, among all.
        width: Magnitudes of each; 0 of a LoRA.
        scales: ``(n, K, 1, 1)``, or None where all are 1.
    """

    layers: Sequence[int]
    rank: int
    shape: tuple[int, ...]
    down: int
    up: int
    channels: int
    width: int
    scales: Tensor | None

    @property
    def fan_in(self) -> int:
        return int(torch.Size(self.shape[1:]).numel())

    def block(self, joined: Tensor, part: str) -> Tensor:
        """A or B of the layers in rows of a stack ``(K, size)``: a view ``(n, K, ...)``."""
        sides = (self.rank, self.fan_in) if part == "down" else (self.shape[0], self.rank)
        start, n = getattr(self, part), len(self.layers)
        view = joined[:, start : start + n * sides[0] * sides[1]]
        return view.view(len(joined), n, *sides).transpose(0, 1)


@dataclass(frozen=True)
class Form:
    """Adapters of the same ranks: neighbours in the stack.

    Attributes:
        vectors: Their parameters.
        source: Of each number of a row of the stack, its place in the vector; behind it for zeros.
        target: Of each number of the vector, its place in a row of the stack.
    """

    vectors: Sequence[Vector]
    source: Tensor
    target: Tensor

    def rows(self) -> Tensor:
        """Their present parameters, ``(count, size)``."""
        size = self.vectors[0].size
        joined = torch.cat([part for v in self.vectors for part in v.parts]).view(-1, size)
        if len(self.source) > size:
            joined = F.pad(joined, (0, 1))
        return joined.index_select(1, self.source)


class StackLayout:
    """The order of K adapters' parameters: those of layers of one shape are neighbours.

    A row of the stack, ``(size,)``, has the parameters of one adapter: all A, all B, all m. Vectors
    over channels have those of all K adapters of a layer before those of the next layer.

    Attributes:
        order: Which of the K adapters each row of the stack is: those of the same ranks are
            neighbours.
        layers: The layers, with their adapters in that order.
        each: The number of each layer in the order of the layout.
        widths: Its magnitudes, in the same order.
    """

    def __init__(self, layers: Sequence[StackedLayer], vectors: Sequence[Vector]) -> None:
        ranks = [tuple(layer.adapters[k].rank for layer in layers) for k in range(len(vectors))]
        self.order = sorted(range(len(vectors)), key=lambda k: ranks[k])
        self.layers = [
            layer._replace(adapters=[layer.adapters[k] for k in self.order]) for layer in layers
        ]
        first = layers[0].adapters[0]
        self.axis, self.has_gain = first.norm_axis, first.magnitude is not None
        self.dtype, self.device = upcast_dtype(layers[0].weight), layers[0].weight.device
        self.shapes = list(self._layout())
        self.forms = [
            self._form([vectors[k] for k in group])
            for _, group in groupby(self.order, key=lambda k: ranks[k])
        ]
        self.widths = [s.width for s in self.shapes for _ in s.layers]
        self.each = [number for shape in self.shapes for number in shape.layers]
        self._indices: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @property
    def count(self) -> int:
        """K."""
        return len(self.order)

    def _layout(self) -> Iterator[StackedShape]:
        """The shapes, in whose order everything lies."""

        def kind(number: int) -> tuple[Any, ...]:
            layer = self.layers[number]
            return layer.rank, tuple(layer.weight.shape), str(layer.weight.dtype)

        numbers = sorted(range(len(self.layers)), key=kind)
        groups = [list(group) for _, group in groupby(numbers, key=kind)]
        down, channels = 0, 0
        up = sum(self.layers[n].rank * self.layers[n].weight[0].numel() for n in numbers)
        for group in groups:
            layer = self.layers[group[0]]
            shape, rank = tuple(layer.weight.shape), layer.rank
            width = shape[self.axis == "input"] if self.has_gain else 0
            scales = [[a.scale for a in self.layers[n].adapters] for n in group]
            is_one = all(scale == 1 for of_layer in scales for scale in of_layer)
            factors = self.here(torch.tensor(scales, dtype=self.dtype)[..., None, None])
            made = StackedShape(
                group, rank, shape, down, up, channels, width, None if is_one else factors
            )
            yield made
            down += len(group) * rank * made.fan_in
            up += len(group) * rank * shape[0]
            channels += len(group) * width
        self.start, self.channels = up, channels
        self.size = up + channels

    def here(self, tensor: Tensor) -> Tensor:
        """A tensor on the device of the layers."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device).copy_(tensor)

    def _form(self, vectors: Sequence[Vector]) -> Form:
        size, row = vectors[0].size, self._row_of(vectors[0])
        # What only fills ranks up is written behind the vector's end, and dropped.
        target = torch.zeros(size + 1, dtype=torch.int64)
        target = target.scatter_(0, row, torch.arange(self.size))[:size]
        kind = torch.int32 if max(size, self.size) < 2**31 else torch.int64
        return Form(vectors, self.here(row.to(kind)), self.here(target.to(kind)))

    def _row_of(self, vector: Vector) -> Tensor:
        """Of each number of a row of the stack, its place in a vector; its size for none."""
        row = torch.full((1, self.size), vector.size)
        firsts = [id(own.down) for own in self.layers[0].adapters]
        k = next(k for k, first in enumerate(firsts) if first in vector.offsets)
        each = (layer.adapters[k] for layer in self.layers)
        parts = (part for own in each for part in (own.down, own.up, own.magnitude))
        if sum(part.numel() for part in parts if part is not None) != vector.size:
            raise ValueError("an adapter has parameters that are not in the stack")
        for shape in self.shapes:
            downs, ups = shape.block(row, "down"), shape.block(row, "up")
            for place, number in enumerate(shape.layers):
                own = self.layers[number].adapters[k]
                start = vector.offsets[id(own.down)]
                numbers = torch.arange(start, start + own.down.numel())
                downs[place, 0, : own.rank] = numbers.view(own.rank, -1)
                start = vector.offsets[id(own.up)]
                numbers = torch.arange(start, start + own.up.numel())
                ups[place, 0, :, : own.rank] = numbers.view(-1, own.rank)
                if own.magnitude is not None:
                    start = vector.offsets[id(own.magnitude)]
                    at = self.start + shape.channels + place * shape.width
                    row[0, at : at + shape.width] = torch.arange(start, start + shape.width)
        return row[0]

    def is_each_once(self, rows: tuple[int, ...]) -> bool:
        """Whether the rows are the K adapters in their order."""
        return rows == tuple(range(self.count))

    def index(self, rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Rows as a tensor, and where their channels lie in a vector over all channels."""
        if rows not in self._indices:
            chosen, places, start = torch.tensor(rows), [], 0
            for width in self.widths:
                channels = torch.arange(width)
                places.append((start + chosen[:, None] * width + channels).flatten())
                start += self.count * width
            if len(self._indices) == _KEPT:
                self._indices.clear()
            self._indices[rows] = self.here(chosen), self.here(torch.cat(places))
        return self._indices[rows]
