"""Several adapters of the same layers as one stacked set of parameters, for rows of one batch.

What a `plan` is for one adapter, this is for K: norms and factors of all of them at once, with a
leading dimension K and ranks filled up with zeros, which change nothing and have no gradient. Each
adapter's parameters stay in a vector of its own, as its optimizer has them, and so do its
gradients: what lies between is a gather to, and one from, the order that layers compute in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_diffusion.numerics.dora import NORM_FLOOR
from dora_diffusion.numerics.dora import gain as gain_of
from dora_diffusion.numerics.precision import full_precision, upcast_dtype
from dora_diffusion.numerics.prepare.factors import Factors, WeightStatistics, direction_of
from dora_diffusion.numerics.prepare.layout import DeferredFlags
from dora_diffusion.numerics.prepare.norms import (
    SameShape,
    factored_norm,
    is_ill_conditioned,
    norm_terms,
    parts_of,
    widens,
)
from dora_diffusion.numerics.prepare.plan import MARGIN, SMALL_GAIN
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
class _Shape:
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
class _Form:
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


class Stack:
    """K adapters of the same layers.

    Args:
        layers: The layers; each has the K adapters in the same order.
        vectors: The parameters of each of the K.

    Attributes:
        order: Which of the K each row of the stack is: those of the same ranks are neighbours.
        direct: Layers that multiply by their gain in the graph, see `Factors.is_direct`.
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
        self._shapes = list(self._layout())
        self._forms = [
            self._form([vectors[k] for k in group])
            for _, group in groupby(self.order, key=lambda k: ranks[k])
        ]
        self._widths = [s.width for s in self._shapes for _ in s.layers]
        self._each = [number for shape in self._shapes for number in shape.layers]
        if self.has_gain:
            self._constants()
        self._flags, self._anchor = DeferredFlags(), torch.zeros((), requires_grad=True)
        self._indices: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @property
    def count(self) -> int:
        """K."""
        return len(self.order)

    def _layout(self) -> Iterator[_Shape]:
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
            factors = self._here(torch.tensor(scales, dtype=self.dtype)[..., None, None])
            made = _Shape(
                group, rank, shape, down, up, channels, width, None if is_one else factors
            )
            yield made
            down += len(group) * rank * made.fan_in
            up += len(group) * rank * shape[0]
            channels += len(group) * width
        self._start, self.channels = up, channels
        self.size = up + channels

    def _here(self, tensor: Tensor) -> Tensor:
        """A tensor on the device of the layers."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device).copy_(tensor)

    def _form(self, vectors: Sequence[Vector]) -> _Form:
        size, row = vectors[0].size, self._row_of(vectors[0])
        # What only fills ranks up is written behind the vector's end, and dropped.
        target = torch.zeros(size + 1, dtype=torch.int64)
        target = target.scatter_(0, row, torch.arange(self.size))[:size]
        kind = torch.int32 if max(size, self.size) < 2**31 else torch.int64
        return _Form(vectors, self._here(row.to(kind)), self._here(target.to(kind)))

    def _row_of(self, vector: Vector) -> Tensor:
        """Of each number of a row of the stack, its place in a vector; its size for none."""
        row = torch.full((1, self.size), vector.size)
        firsts = [id(own.down) for own in self.layers[0].adapters]
        k = next(k for k, first in enumerate(firsts) if first in vector.offsets)
        each = (layer.adapters[k] for layer in self.layers)
        parts = (part for own in each for part in (own.down, own.up, own.magnitude))
        if sum(part.numel() for part in parts if part is not None) != vector.size:
            raise ValueError("an adapter has parameters that are not in the stack")
        for shape in self._shapes:
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
                    at = self._start + shape.channels + place * shape.width
                    row[0, at : at + shape.width] = torch.arange(start, start + shape.width)
        return row[0]

    def _constants(self) -> None:
        """What no step changes: ``|W|^2``, biases, and where each adapter's magnitudes lie.

        Vectors over channels have those of all K adapters of a layer before those of the next.
        """
        base, bias, places = [], [], []
        for shape in self._shapes:
            for place, number in enumerate(shape.layers):
                layer = self.layers[number]
                base.append(layer.statistics.squared_norm.expand(self.count, -1).flatten())
                own = layer.bias if self.axis == "output" else None
                zeros = torch.zeros(shape.width, dtype=self.dtype, device=self.device)
                bias.append((zeros if own is None else own.to(zeros)).repeat(self.count))
                start = self._start + shape.channels + place * shape.width
                rows = torch.arange(self.count)[:, None] * self.size
                places.append((rows + torch.arange(start, start + shape.width)).flatten())
        self._base, self._bias = torch.cat(base), torch.cat(bias)
        self._places = self._here(torch.cat(places))
        self._has_bias = [
            self.axis == "output" and self.layers[n].bias is not None for n in self._each
        ]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the present parameters: their norms and gains. Gradients start from 0."""
        rows = [form.rows() for form in self._forms]
        joined = (rows[0] if len(rows) == 1 else torch.cat(rows)).to(self.dtype)
        self.gradient = torch.zeros_like(joined)
        self.used: set[int] = set()
        self._made: dict[Any, list[Factors]] = {}
        self.direct = {n for n, layer in enumerate(self.layers) if not layer.keep_output}
        self._downs = [shape.block(joined, "down").contiguous() for shape in self._shapes]
        self._ups = [_scaled(shape.block(joined, "up"), shape.scales) for shape in self._shapes]
        if not self.has_gain:
            return
        with full_precision(self.device):
            self._norms(joined)

    def _norms(self, joined: Tensor) -> None:
        terms = [self._terms(number) for number in range(len(self._shapes))]
        change = torch.cat([t.change.flatten() for t in terms])
        bound = torch.cat([t.bound.flatten() for t in terms])
        total = change + self._base
        self.norm = total.clamp_min(0).sqrt_()
        magnitude = joined.view(-1).index_select(0, self._places)
        self.gain = gain_of(magnitude, self.norm)
        flagged = is_ill_conditioned(total, self._base, bound, MARGIN).logical_or_(
            ~(self.gain.abs() >= MARGIN * SMALL_GAIN)
        )
        sizes = [width for width in self._widths for _ in range(self.count)]
        numbers = self._flags.layers(flagged, sizes)
        if not numbers:
            return
        norms, gains = torch.split(self.norm, sizes), torch.split(self.gain, sizes)
        for number in numbers:
            place, k = divmod(number, self.count)
            layer = self.layers[self._each[place]]
            own = layer.adapters[k]
            factors = layer.weight, own.down, own.up, own.scale, self.axis
            norms[number].copy_(factored_norm(*factors, layer.statistics.squared_norm))
            assert own.magnitude is not None
            gains[number].copy_(gain_of(own.magnitude.to(self.dtype), norms[number]))
            if bool((gains[number].abs() < SMALL_GAIN).any()):
                self.direct.add(self._each[place])

    def _terms(self, number: int) -> Any:
        """The terms of the norms of one shape."""
        shape = self._shapes[number]
        weights = [self.layers[n].weight for n in shape.layers]
        down, up = self._downs[number].flatten(0, 1), self._ups[number].flatten(0, 1)
        seen = down if self.axis == "output" else up
        parts = parts_of(seen) if widens(weights[0]) else [seen]
        # The scale is in B.
        return norm_terms(SameShape(weights, down, up, 1.0, self.axis, parts))

    def factors(self, dtype: torch.dtype, rows: tuple[int, ...]) -> list[Factors]:
        """What each layer computes with in a dtype: ``down (N, r, in, *k)``, ``up (N, out, r)``.

        Args:
            dtype: To compute in.
            rows: The adapter of each of N rows, by its place in the stack.
        """
        key = (dtype, rows)
        if key not in self._made:
            with torch.inference_mode(False), torch.enable_grad():
                made: tuple[Tensor, ...] = _Prepare.apply(self, dtype, rows, self._anchor)  # type: ignore[no-untyped-call]
            count = len(self._each)
            parts = [made[i * count : (i + 1) * count] for i in range(3 if self.has_gain else 2)]
            names = ("down", "up", "gain")[: len(parts)]
            factors = [
                Factors(**dict(zip(names, part, strict=True)), axis=self.axis)
                for part in zip(*parts, strict=True)
            ]
            if self.has_gain:
                numerators, shifts = iter(made[3 * count :]), self._shifts(dtype, rows)
                factors = [
                    f._replace(shift=shift, shift_numerator=next(numerators)) if has_bias else f
                    for f, has_bias, shift in zip(factors, self._has_bias, shifts, strict=True)
                ]
            by_number = dict(zip(self._each, factors, strict=True))
            self._made[key] = [by_number[number] for number in range(count)]
        return self._made[key]

    def direction(self, number: int, k: int, dtype: torch.dtype) -> Tensor | None:
        """`direction_of` one adapter of a layer."""
        return direction_of(self.layers[number].weight, self.layers[number].adapters[k], dtype)

    @torch.no_grad()
    def _shifts(self, dtype: torch.dtype, rows: tuple[int, ...]) -> Sequence[Tensor]:
        """``(1 - g) b`` of each layer, ``(N, out)``; without meaning where there is no bias."""
        return self.of_rows(((1 - self.gain) * self._bias).to(dtype), rows)

    def is_each_once(self, rows: tuple[int, ...]) -> bool:
        """Whether the rows are the K adapters in their order."""
        return rows == tuple(range(self.count))

    def index(self, rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Rows as a tensor, and where their channels lie in a vector over all channels."""
        if rows not in self._indices:
            chosen, places, start = torch.tensor(rows), [], 0
            for width in self._widths:
                channels = torch.arange(width)
                places.append((start + chosen[:, None] * width + channels).flatten())
                start += self.count * width
            if len(self._indices) == _KEPT:
                self._indices.clear()
            self._indices[rows] = self._here(chosen), self._here(torch.cat(places))
        return self._indices[rows]

    def of_rows(self, vector: Tensor, rows: tuple[int, ...]) -> Sequence[Tensor]:
        """Each layer's part of a vector over all channels, ``(N, width)``."""
        if not self.is_each_once(rows):
            vector = vector.index_select(0, self.index(rows)[1])
        parts = torch.split(vector, [len(rows) * width for width in self._widths])
        return [part.view(len(rows), -1) for part in parts]

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """The gradient of each adapter's vector, in the order of the vectors that were given."""
        made: dict[int, Tensor] = {}
        start = 0
        for form in self._forms:
            end = start + len(form.vectors)
            parts = self.gradient[start:end].index_select(1, form.target)
            parts = parts.to(form.vectors[0].parts[0].dtype)
            made |= zip(self.order[start:end], parts.unbind(), strict=True)
            start = end
        return [made[k] for k in range(self.count)]

    def unused(self, k: int) -> list[Tensor]:
        """The parameters of an adapter that no gradient has reached, by its given number."""
        place, parts = self.order.index(k), []
        for number in set(range(len(self.layers))) - self.used:
            own = self.layers[number].adapters[place]
            parts += [own.down, own.up, *([] if own.magnitude is None else [own.magnitude])]
        return parts

    def accumulate(
        self, rows: tuple[int, ...], downs: Sequence[Tensor], ups: Sequence[Tensor]
    ) -> None:
        """Add gradients of the factors of rows, ``(n, N, ...)`` of each shape, to those of A, B."""
        chosen = None if self.is_each_once(rows) else self.index(rows)[0]
        gains = self._gain_blocks() if self.has_gain and self.axis == "output" else None
        for number, (shape, down, up) in enumerate(zip(self._shapes, downs, ups, strict=True)):
            if chosen is not None:
                up = up.new_zeros(len(up), self.count, *up.shape[2:]).index_add_(1, chosen, up)
                shape.block(self.gradient, "down").index_add_(1, chosen, down)
            else:
                shape.block(self.gradient, "down").add_(down)
            factor = shape.scales
            if gains is not None:
                factor = gains[number] if factor is None else gains[number] * factor
            target = shape.block(self.gradient, "up")
            target.add_(up) if factor is None else target.addcmul_(up, factor)

    def _gain_blocks(self) -> list[Tensor]:
        """The gain of each shape, ``(n, K, width, 1)``."""
        sizes = [len(shape.layers) * self.count * shape.width for shape in self._shapes]
        return [
            part.view(len(shape.layers), self.count, shape.width, 1)
            for shape, part in zip(self._shapes, torch.split(self.gain, sizes), strict=True)
        ]

    def accumulate_magnitudes(self, rows: tuple[int, ...], sums: Tensor, shifts: Tensor) -> None:
        """Add to the gradients of m; see `Plan.magnitude_gradient`.

        Args:
            rows: Of the sums.
            sums: Of all layers, each ``(N, width)``.
            shifts: The same of the shifts' numerators.
        """
        if not self.is_each_once(rows):
            places, zeros = self.index(rows)[1], torch.zeros_like(self.gain)
            sums = zeros.index_add(0, places, sums)
            shifts = zeros.index_add(0, places, shifts)
        total = sums.addcmul(shifts, self._bias, value=-1)
        gain = self.gain.masked_fill(self.gain == 0, 1)
        if self.direct:
            parts = torch.split(gain, [self.count * width for width in self._widths])
            for part, number in zip(parts, self._each, strict=True):
                if number in self.direct:
                    part.fill_(1)
        total.div_(gain.mul_(self.norm.clamp_min(NORM_FLOOR)))
        self.gradient.view(-1).index_add_(0, self._places, total)

    def prepared(self, dtype: torch.dtype, rows: tuple[int, ...]) -> list[Tensor]:
        """A, B and gains of all layers in rows, and zeros for the shifts' numerators."""
        downs, ups = list(self._downs), list(self._ups)
        if self.has_gain and self.axis == "output":
            ups = [up * gain for up, gain in zip(ups, self._gain_blocks(), strict=True)]
        if not self.is_each_once(rows):
            chosen = self.index(rows)[0]
            downs, ups = ([b.index_select(1, chosen) for b in blocks] for blocks in (downs, ups))
        made: list[Tensor] = []
        for shape, block in zip(self._shapes, downs, strict=True):
            sides = (len(rows), shape.rank, *shape.shape[1:])
            made += (part.view(sides) for part in block.to(dtype).unbind())
        for block in ups:
            made += block.to(dtype).unbind()
        if self.has_gain:
            made += self.of_rows(self.gain, rows)
            zeros = self.gain.new_zeros(len(rows) * self.channels)
            parts = torch.split(zeros, [len(rows) * width for width in self._widths])
            each = zip(parts, self._has_bias, strict=True)
            made += (part.view(len(rows), -1) for part, has_bias in each if has_bias)
        return made

    def blocks(self, rows: int, *, is_whole: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Memory for gradients of the factors of so many rows, ``(n, rows, ...)`` of each shape."""
        new = torch.empty if is_whole else torch.zeros
        sides = [(len(shape.layers), rows) for shape in self._shapes]
        each = list(zip(self._shapes, sides, strict=True))
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        return (
            [new(*side, shape.rank, shape.fan_in, **options) for shape, side in each],
            [new(*side, shape.shape[0], shape.rank, **options) for shape, side in each],
        )

    def vectors(self, rows: int, given: Sequence[Tensor | None]) -> Tensor:
        """Each layer's sums ``(rows, width)`` as a vector over all; zeros where there is none."""
        zeros = self.gain.new_zeros(rows * max(self._widths))
        parts = zip(given, self._widths, strict=True)
        return torch.cat([zeros[: rows * w] if g is None else g.flatten() for g, w in parts])

    def note_used(self, places: Collection[int]) -> None:
        """Note layers, by their place in the layout, whose factors have got a gradient."""
        self.used.update(self._each[place] for place in places)


def _scaled(block: Tensor, scales: Tensor | None) -> Tensor:
    """``scales * block``, contiguous."""
    if scales is None:
        return block.contiguous()
    return torch.mul(block, scales, out=torch.empty(block.shape).to(block))


class _Prepare(torch.autograd.Function):
    """All A, B and m of a stack to the factors of rows; their gradients are left in the stack."""

    @staticmethod
    def forward(ctx: Any, stack: Stack, dtype: torch.dtype, rows: Any, _: Tensor) -> Any:
        ctx.stack, ctx.rows = stack, rows
        ctx.set_materialize_grads(False)
        return tuple(stack.prepared(dtype, rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        stack, rows = ctx.stack, ctx.rows
        count = len(stack.layers)
        downs, ups, sums = (grads[i * count : (i + 1) * count] for i in range(3))
        used = [place for place, grad in enumerate(downs) if grad is not None]
        stack.note_used(used)
        down, up = stack.blocks(len(rows), is_whole=len(used) == count)
        targets = [part for block in (*down, *up) for part in block.unbind()]
        pairs = [(t, g) for t, g in zip(targets, (*downs, *ups), strict=True) if g is not None]
        if pairs:
            torch._foreach_copy_([t for t, _ in pairs], [g.view(t.shape) for t, g in pairs])
        stack.accumulate(rows, down, up)
        if stack.has_gain:
            each = iter(grads[3 * count :])
            numerators = [next(each) if has_bias else None for has_bias in stack._has_bias]
            total, shifts = stack.vectors(len(rows), sums), stack.vectors(len(rows), numerators)
            stack.accumulate_magnitudes(rows, total, shifts)
        return (None, None, None, None)
