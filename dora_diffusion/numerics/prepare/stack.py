"""Several adapters of the same layers as one stacked set of parameters, for rows of one batch.

What a `plan` is for one adapter, this is for K: norms and factors of all of them at once, with a
leading dimension K and ranks filled up with zeros, which change nothing and have no gradient. Each
adapter's parameters stay in a vector of its own, as its optimizer has them, and so do its
gradients: what lies between is a gather to, and one from, the order that layers compute in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_diffusion.numerics.dora import NORM_FLOOR
from dora_diffusion.numerics.dora import gain as gain_of
from dora_diffusion.numerics.precision import full_precision
from dora_diffusion.numerics.prepare.factors import Factors, direction_of
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
from dora_diffusion.numerics.prepare.stack_layout import StackedLayer, StackLayout, Vector


class Stack:
    """K adapters of the same layers.

    Args:
        layers: The layers; each has the K adapters in the same order.
        vectors: The parameters of each of the K.

    Attributes:
        layout: Where everything lies.
        direct: Layers that multiply by their gain in the graph, see `Factors.is_direct`.
    """

    def __init__(self, layers: Sequence[StackedLayer], vectors: Sequence[Vector]) -> None:
        self.layout = StackLayout(layers, vectors)
        self._flags, self._anchor = DeferredFlags(), torch.zeros((), requires_grad=True)
        if self.layout.has_gain:
            self._constants()

    def _constants(self) -> None:
        """What no step changes: ``|W|^2``, biases, and where each adapter's magnitudes lie.

        Vectors over channels have those of all K adapters of a layer before those of the next.
        """
        base, bias, places = [], [], []
        for shape in self.layout.shapes:
            for place, number in enumerate(shape.layers):
                layer = self.layout.layers[number]
                base.append(layer.statistics.squared_norm.expand(self.layout.count, -1).flatten())
                own = layer.bias if self.layout.axis == "output" else None
                zeros = torch.zeros(shape.width, dtype=self.layout.dtype, device=self.layout.device)
                bias.append((zeros if own is None else own.to(zeros)).repeat(self.layout.count))
                start = self.layout.start + shape.channels + place * shape.width
                rows = torch.arange(self.layout.count)[:, None] * self.layout.size
                places.append((rows + torch.arange(start, start + shape.width)).flatten())
        self._base, self._bias = torch.cat(base), torch.cat(bias)
        self._places = self.layout.here(torch.cat(places))
        self._has_bias = [
            self.layout.axis == "output" and self.layout.layers[n].bias is not None
            for n in self.layout.each
        ]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the present parameters: their norms and gains. Gradients start from 0."""
        rows = [form.rows() for form in self.layout.forms]
        joined = (rows[0] if len(rows) == 1 else torch.cat(rows)).to(self.layout.dtype)
        self.gradient = torch.zeros_like(joined)
        self.used: set[int] = set()
        self._made: dict[Any, list[Factors]] = {}
        self.direct = {n for n, layer in enumerate(self.layout.layers) if not layer.keep_output}
        self._downs = [shape.block(joined, "down").contiguous() for shape in self.layout.shapes]
        self._ups = [
            _scaled(shape.block(joined, "up"), shape.scales) for shape in self.layout.shapes
        ]
        if not self.layout.has_gain:
            return
        with full_precision(self.layout.device):
            self._norms(joined)

    def _norms(self, joined: Tensor) -> None:
        terms = [self._terms(number) for number in range(len(self.layout.shapes))]
        change = torch.cat([t.change.flatten() for t in terms])
        bound = torch.cat([t.bound.flatten() for t in terms])
        total = change + self._base
        self.norm = total.clamp_min(0).sqrt_()
        magnitude = joined.view(-1).index_select(0, self._places)
        self.gain = gain_of(magnitude, self.norm)
        flagged = is_ill_conditioned(total, self._base, bound, MARGIN).logical_or_(
            ~(self.gain.abs() >= MARGIN * SMALL_GAIN)
        )
        sizes = [width for width in self.layout.widths for _ in range(self.layout.count)]
        numbers = self._flags.layers(flagged, sizes)
        if not numbers:
            return
        norms, gains = torch.split(self.norm, sizes), torch.split(self.gain, sizes)
        for number in numbers:
            place, k = divmod(number, self.layout.count)
            layer = self.layout.layers[self.layout.each[place]]
            own = layer.adapters[k]
            factors = layer.weight, own.down, own.up, own.scale, self.layout.axis
            norms[number].copy_(factored_norm(*factors, layer.statistics.squared_norm))
            assert own.magnitude is not None
            gains[number].copy_(gain_of(own.magnitude.to(self.layout.dtype), norms[number]))
            if bool((gains[number].abs() < SMALL_GAIN).any()):
                self.direct.add(self.layout.each[place])

    def _terms(self, number: int) -> Any:
        """The terms of the norms of one shape."""
        shape = self.layout.shapes[number]
        weights = [self.layout.layers[n].weight for n in shape.layers]
        down, up = self._downs[number].flatten(0, 1), self._ups[number].flatten(0, 1)
        seen = down if self.layout.axis == "output" else up
        parts = parts_of(seen) if widens(weights[0]) else [seen]
        # The scale is in B.
        return norm_terms(SameShape(weights, down, up, 1.0, self.layout.axis, parts))

    def factors(self, dtype: torch.dtype, rows: tuple[int, ...]) -> list[Factors]:
        """What each layer computes with in a dtype: ``down (N, r, in, *k)``, ``up (N, out, r)``.

        Args:
            dtype: To compute in.
            rows: The adapter of each of N rows, by its place in the stack.
        """
        key = (dtype, rows)
        if key not in self._made:
            with torch.inference_mode(False), torch.enable_grad():
                made: tuple[Tensor, ...] = _PrepareStack.apply(self, dtype, rows, self._anchor)  # type: ignore[no-untyped-call]
            count = len(self.layout.each)
            parts = [
                made[i * count : (i + 1) * count] for i in range(3 if self.layout.has_gain else 2)
            ]
            names = ("down", "up", "gain")[: len(parts)]
            factors = [
                Factors(**dict(zip(names, part, strict=True)), axis=self.layout.axis)
                for part in zip(*parts, strict=True)
            ]
            if self.layout.has_gain:
                numerators, shifts = iter(made[3 * count :]), self._shifts(dtype, rows)
                factors = [
                    f._replace(shift=shift, shift_numerator=next(numerators)) if has_bias else f
                    for f, has_bias, shift in zip(factors, self._has_bias, shifts, strict=True)
                ]
            by_number = dict(zip(self.layout.each, factors, strict=True))
            self._made[key] = [by_number[number] for number in range(count)]
        return self._made[key]

    def direction(self, number: int, k: int, dtype: torch.dtype) -> Tensor | None:
        """`direction_of` one adapter of a layer."""
        return direction_of(
            self.layout.layers[number].weight, self.layout.layers[number].adapters[k], dtype
        )

    @torch.no_grad()
    def _shifts(self, dtype: torch.dtype, rows: tuple[int, ...]) -> Sequence[Tensor]:
        """``(1 - g) b`` of each layer, ``(N, out)``; without meaning where there is no bias."""
        return self.of_rows(((1 - self.gain) * self._bias).to(dtype), rows)

    def of_rows(self, vector: Tensor, rows: tuple[int, ...]) -> Sequence[Tensor]:
        """Each layer's part of a vector over all channels, ``(N, width)``."""
        if not self.layout.is_each_once(rows):
            vector = vector.index_select(0, self.layout.index(rows)[1])
        parts = torch.split(vector, [len(rows) * width for width in self.layout.widths])
        return [part.view(len(rows), -1) for part in parts]

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """The gradient of each adapter's vector, in the order of the vectors that were given."""
        made: dict[int, Tensor] = {}
        start = 0
        for form in self.layout.forms:
            end = start + len(form.vectors)
            parts = self.gradient[start:end].index_select(1, form.target)
            parts = parts.to(form.vectors[0].parts[0].dtype)
            made |= zip(self.layout.order[start:end], parts.unbind(), strict=True)
            start = end
        return [made[k] for k in range(self.layout.count)]

    def unused(self, k: int) -> list[Tensor]:
        """The parameters of an adapter that no gradient has reached, by its given number."""
        place, parts = self.layout.order.index(k), []
        for number in set(range(len(self.layout.layers))) - self.used:
            own = self.layout.layers[number].adapters[place]
            parts += [own.down, own.up, *([] if own.magnitude is None else [own.magnitude])]
        return parts

    def accumulate(
        self, rows: tuple[int, ...], downs: Sequence[Tensor], ups: Sequence[Tensor]
    ) -> None:
        """Add gradients of the factors of rows, ``(n, N, ...)`` of each shape, to those of A, B."""
        chosen = None if self.layout.is_each_once(rows) else self.layout.index(rows)[0]
        gains = (
            self._gain_blocks() if self.layout.has_gain and self.layout.axis == "output" else None
        )
        for number, (shape, down, up) in enumerate(
            zip(self.layout.shapes, downs, ups, strict=True)
        ):
            if chosen is not None:
                up = up.new_zeros(len(up), self.layout.count, *up.shape[2:]).index_add_(
                    1, chosen, up
                )
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
        sizes = [
            len(shape.layers) * self.layout.count * shape.width for shape in self.layout.shapes
        ]
        return [
            part.view(len(shape.layers), self.layout.count, shape.width, 1)
            for shape, part in zip(self.layout.shapes, torch.split(self.gain, sizes), strict=True)
        ]

    def accumulate_magnitudes(self, rows: tuple[int, ...], sums: Tensor, shifts: Tensor) -> None:
        """Add to the gradients of m; see `Plan.magnitude_gradient`.

        Args:
            rows: Of the sums.
            sums: Of all layers, each ``(N, width)``.
            shifts: The same of the shifts' numerators.
        """
        if not self.layout.is_each_once(rows):
            places, zeros = self.layout.index(rows)[1], torch.zeros_like(self.gain)
            sums = zeros.index_add(0, places, sums)
            shifts = zeros.index_add(0, places, shifts)
        total = sums.addcmul(shifts, self._bias, value=-1)
        gain = self.gain.masked_fill(self.gain == 0, 1)
        if self.direct:
            parts = torch.split(gain, [self.layout.count * width for width in self.layout.widths])
            for part, number in zip(parts, self.layout.each, strict=True):
                if number in self.direct:
                    part.fill_(1)
        total.div_(gain.mul_(self.norm.clamp_min(NORM_FLOOR)))
        self.gradient.view(-1).index_add_(0, self._places, total)

    def prepared(self, dtype: torch.dtype, rows: tuple[int, ...]) -> list[Tensor]:
        """A, B and gains of all layers in rows, and zeros for the shifts' numerators."""
        downs, ups = list(self._downs), list(self._ups)
        if self.layout.has_gain and self.layout.axis == "output":
            ups = [up * gain for up, gain in zip(ups, self._gain_blocks(), strict=True)]
        if not self.layout.is_each_once(rows):
            chosen = self.layout.index(rows)[0]
            downs, ups = ([b.index_select(1, chosen) for b in blocks] for blocks in (downs, ups))
        made: list[Tensor] = []
        for shape, block in zip(self.layout.shapes, downs, strict=True):
            sides = (len(rows), shape.rank, *shape.shape[1:])
            made += (part.view(sides) for part in block.to(dtype).unbind())
        for block in ups:
            made += block.to(dtype).unbind()
        if self.layout.has_gain:
            made += self.of_rows(self.gain, rows)
            zeros = self.gain.new_zeros(len(rows) * self.layout.channels)
            parts = torch.split(zeros, [len(rows) * width for width in self.layout.widths])
            each = zip(parts, self._has_bias, strict=True)
            made += (part.view(len(rows), -1) for part, has_bias in each if has_bias)
        return made

    def blocks(self, rows: int, *, is_whole: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Memory for gradients of the factors of so many rows, ``(n, rows, ...)`` of each shape."""
        new = torch.empty if is_whole else torch.zeros
        sides = [(len(shape.layers), rows) for shape in self.layout.shapes]
        each = list(zip(self.layout.shapes, sides, strict=True))
        options: dict[str, Any] = {"dtype": self.layout.dtype, "device": self.layout.device}
        return (
            [new(*side, shape.rank, shape.fan_in, **options) for shape, side in each],
            [new(*side, shape.shape[0], shape.rank, **options) for shape, side in each],
        )

    def vectors(self, rows: int, given: Sequence[Tensor | None]) -> Tensor:
        """Each layer's sums ``(rows, width)`` as a vector over all; zeros where there is none."""
        zeros = self.gain.new_zeros(rows * max(self.layout.widths))
        parts = zip(given, self.layout.widths, strict=True)
        return torch.cat([zeros[: rows * w] if g is None else g.flatten() for g, w in parts])

    def note_used(self, places: Collection[int]) -> None:
        """Note layers, by their place in the layout, whose factors have got a gradient."""
        self.used.update(self.layout.each[place] for place in places)


def _scaled(block: Tensor, scales: Tensor | None) -> Tensor:
    """``scales * block``, contiguous."""
    if scales is None:
        return block.contiguous()
    return torch.mul(block, scales, out=torch.empty(block.shape).to(block))


class _PrepareStack(torch.autograd.Function):
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
        count = len(stack.layout.layers)
        downs, ups, sums = (grads[i * count : (i + 1) * count] for i in range(3))
        used = [place for place, grad in enumerate(downs) if grad is not None]
        stack.note_used(used)
        down, up = stack.blocks(len(rows), is_whole=len(used) == count)
        targets = [part for block in (*down, *up) for part in block.unbind()]
        pairs = [(t, g) for t, g in zip(targets, (*downs, *ups), strict=True) if g is not None]
        if pairs:
            torch._foreach_copy_([t for t, _ in pairs], [g.view(t.shape) for t, g in pairs])
        stack.accumulate(rows, down, up)
        if stack.layout.has_gain:
            each = iter(grads[3 * count :])
            numerators = [next(each) if has_bias else None for has_bias in stack._has_bias]
            total, shifts = stack.vectors(len(rows), sums), stack.vectors(len(rows), numerators)
            stack.accumulate_magnitudes(rows, total, shifts)
        return (None, None, None, None)
