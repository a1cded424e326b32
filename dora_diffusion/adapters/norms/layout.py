"""Memory layout of many layers' parameters, so that one operation serves all of them, and flags.

Everything of one kind lies in one buffer: all A one after the other, all B of one rank as rows, and
all vectors. Layers of one shape are neighbours there, and so are the K adapters of a layer in it:
an operation that is not a product with W does not depend on K. The order follows from shapes and
settings alone, so that a loop makes it once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, groupby
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dora_diffusion.adapters.norms.factors import Rows, Site
from dora_diffusion.numerics.norms import widens
from dora_diffusion.numerics.precision import upcast_dtype

# Devices whose flags are read a step late.
_DEFERRED = {"cuda"}
# Of how many ways to lay out the rows of a batch the indices are kept.
_KEPT = 8


@torch.no_grad()
def join(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of any shapes, at least one, one after the other in a new vector."""
    joined: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return joined.clone() if len(tensors) == 1 else joined


@torch.no_grad()
def split_like(joined: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split what `join` made of tensors of these shapes into views in these shapes."""
    parts: Sequence[Tensor] = _unflatten_dense_tensors(joined.detach(), tensors)  # type: ignore[no-untyped-call]
    # An empty one has the shape (0,) with torch 2.6.
    return [p if p.numel() else p.view(t.shape) for p, t in zip(parts, tensors, strict=True)]


class Layout:
    """The order of K adapters of layers that are of one `_division`.

    Buffers are all A, one after the other, and of each rank all B as rows ``(rows, r)``. Vectors
    over channels have those of all K adapters of a layer before those of the next.

    Attributes:
        sites: Layers with their adapters, in the order in which those of one shape are neighbours.
        numbers: The place of each among those that were given.
        count: K.
        axis: The norm's.
        has_gain: Whether they are DoRA, and not LoRA.
        shapes: Neighbours of one rank, shape, scales and dtype.
        sides: What those of each have in common.
        widens: Whether products with their weights can be float32 (`norms.widens`).
        scales: ``s`` of each rank's rows of B: a number, or, where adapters differ, ``(rows, 1)``.
        widths: How many magnitudes an adapter of each layer has; 0 of a LoRA.
        sizes: The same for each adapter of each layer.
        has_bias: Whether the gain of a layer must spare a bias.
        direct: Places of layers that multiply by their gain in the graph (`Factors.is_direct`).
        parameters: All A, all B and all m, each layer by layer and adapter by adapter.
    """

    def __init__(self, sites: Sequence[Site], numbers: Sequence[int]) -> None:
        self.numbers = sorted(numbers, key=lambda number: _kind(sites[number]))
        self.sites = sites = [sites[number] for number in self.numbers]
        first = sites[0].adapters[0]
        self.count = len(sites[0].adapters)
        self.axis, self.has_gain = first.norm_axis, first.magnitude is not None
        self.dtype, self.device = upcast_dtype(sites[0].weight), sites[0].weight.device
        self.shapes = [list(group) for _, group in groupby(sites, key=_kind)]
        self.sides = [_Sides.of(group) for group in self.shapes]
        self.widens = [widens(group[0].weight) for group in self.shapes]
        # Neighbours of one rank, whose B are rows of one matrix.
        pairs = zip(self.shapes, self.sides, strict=True)
        groups = [list(group) for _, group in groupby(pairs, key=lambda pair: pair[1].rank)]
        self._ranks = [(group[0][1].rank, [side for _, side in group]) for group in groups]
        self._rows = [sum(side.layers * side.out for side in sides) for _, sides in self._ranks]
        by_rank = [[site for own, _ in group for site in own] for group in groups]
        self.widths = [site.width for site in sites]
        self.sizes = [width for width in self.widths for _ in range(self.count)]
        on_output = self.has_gain and self.axis == "output"
        self.has_bias = [on_output and site.bias is not None for site in sites]
        self.direct = {place for place, site in enumerate(sites) if site.is_direct}
        adapters = [adapter for site in sites for adapter in site.adapters]
        self.parameters = [a.down for a in adapters] + [a.up for a in adapters]
        self.parameters += [a.magnitude for a in adapters if a.magnitude is not None]
        self._downs, self._ups = self._joined_parameters(by_rank)
        self.scales = [self._scales_of(own) for own in by_rank]
        self._written: list[int | None] | None = None
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._templates: dict[int | None, list[list[Tensor]]] = {}
        self.recall()

    @torch.no_grad()
    def recall(self) -> None:
        """Read the statistics of the weights as they are now."""
        if self.has_gain:
            each = [site.statistics for site in self.sites if site.statistics is not None]
            self.base = torch.cat([own.squared_norm.repeat(self.count) for own in each])
            self.recorded = torch.cat([own.checksum for own in each])
            self.recorded_base = torch.cat([own.squared_norm for own in each])

    def look_at_bias(self) -> None:
        """Read the biases as they are now: of each channel, and zeros where there is none."""
        each = list(zip(self.sites, self.has_bias, strict=True))
        own = [site.bias for site, has in each if has and site.bias is not None]
        written = [None if bias.is_inference() else bias._version for bias in own]
        if own and written != self._written:
            zeros = torch.zeros(max(self.widths), dtype=self.dtype, device=self.device)
            vectors = [s.bias.detach().to(zeros) if has else zeros[: s.width] for s, has in each]  # type: ignore[union-attr]
            self.bias = torch.cat([vector.repeat(self.count) for vector in vectors])
            self._written = written

    def _joined_parameters(
        self, by_rank: Sequence[Sequence[Site]]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """All A with the zeros that fill them up to their layer's rank, and the B of each rank."""
        downs: list[Tensor] = []
        ups: list[list[Tensor]] = []
        for (rank, _), sites in zip(self._ranks, by_rank, strict=True):
            adapters = [adapter for site in sites for adapter in site.adapters]
            ups.append([adapter.up for adapter in adapters])
            for down in (adapter.down for adapter in adapters):
                missing = rank - len(down)
                zeros = [down.new_zeros(missing, down[0].numel())] if missing else []
                downs += [down, *zeros]
        return downs, ups

    def _scales_of(self, sites: Sequence[Site]) -> Tensor | float:
        """``s`` of rows of B: a number, or, where adapters differ, ``(rows, 1)``."""
        adapters = [adapter for site in sites for adapter in site.adapters]
        scales = [adapter.scale for adapter in adapters]
        if len(set(scales)) == 1:
            return scales[0]
        rows = torch.tensor([len(adapter.up) for adapter in adapters])
        each = torch.tensor(scales, dtype=torch.float64).repeat_interleave(rows)[:, None]
        return each.to(self.dtype).to(self.device)

    @cached_property
    def anchor(self) -> Tensor:
        """Root of a graph that has no edges to the parameters."""
        return torch.zeros((), requires_grad=True)

    # Parameters to buffers

    def down(self) -> Tensor:
        """All A."""
        return join(self._downs).to(self.dtype)

    @torch.no_grad()
    def up(self) -> list[Tensor]:
        """All B, ``(rows, r)`` of each rank; smaller ones are filled up with zeros."""
        made = []
        for (rank, _), ups in zip(self._ranks, self._ups, strict=True):
            if all(up.shape[1] == rank for up in ups):
                made.append(join(ups).to(self.dtype).view(-1, rank))
                continue
            sizes = [len(up) for up in ups]
            rows = torch.zeros(sum(sizes), rank, dtype=self.dtype, device=self.device)
            pairs = zip(torch.split(rows, sizes), ups, strict=True)
            parts = [part[:, : up.shape[1]] for part, up in pairs]
            torch._foreach_copy_(parts, [up.flatten(1) for up in ups])
            made.append(rows)
        return made

    def magnitude(self) -> Tensor:
        """All m."""
        return join(self.parameters[2 * len(self.sites) * self.count :]).to(self.dtype)

    def row_scales(self, gain: Tensor | None) -> list[Any]:
        """Return the factors of each rank's rows of B: ``g s`` on the output axis, else ``s``."""
        if gain is None or self.axis == "input":
            return self.scales
        gains = torch.split(gain[:, None], [self.count * rows for rows in self._rows])
        pairs = zip(gains, self.scales, strict=True)
        return [g if isinstance(s, float) and s == 1 else g * s for g, s in pairs]

    # Buffers to layers

    def downs_by_shape(self, joined: Tensor, count: int | None = None) -> list[Tensor]:
        """The A of each of `shapes`, ``(n, count, r, in * k)``; K are there if not said."""
        count = count or self.count
        shapes = [(side.layers, count, side.rank, side.fan_in) for side in self.sides]
        parts = torch.split(joined, [prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def ups_by_shape(self, joined: Sequence[Tensor], count: int | None = None) -> list[Tensor]:
        """The B of each of `shapes`, ``(n, count, out, r)``."""
        count, made = count or self.count, []
        for rows, (rank, sides) in zip(joined, self._ranks, strict=True):
            shapes = [(side.layers, count, side.out) for side in sides]
            parts = torch.split(rows, [prod(shape) for shape in shapes])
            made += [p.view(*shape, rank) for p, shape in zip(parts, shapes, strict=True)]
        return made

    def vectors_by_shape(self, joined: Tensor, count: int | None = None) -> list[Tensor]:
        """Split a vector over all channels by the shapes of `shapes`, ``(n, count, width)``."""
        count = count or self.count
        shapes = [(side.layers, count, side.width) for side in self.sides]
        parts = torch.split(joined, [prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def is_whole(self, rows: Rows) -> bool:
        """Return whether these rows are the K adapters in their order."""
        return rows == (0 if self.count == 1 else tuple(range(self.count)))

    def index(self, rows: Rows) -> Tensor:
        """Rows of adapters, on the device."""
        key = (rows,) if isinstance(rows, int) else rows
        if key not in self._indices:
            if len(self._indices) == _KEPT:
                self._indices.clear()
            self._indices[key] = torch.tensor(key).to(self.device)
        return self._indices[key]

    def cut(self, rows: Rows, down: Tensor, ups: Sequence[Tensor]) -> list[Tensor]:
        """Each layer's part of A and B in buffers that are laid out for such rows.

        Of a number the layer's own shapes, ``(r, in, *k)`` and ``(out, r, *1)``; of rows with ``N``
        in front, and B without ones.
        """
        downs, *groups = self._shaped(None if isinstance(rows, int) else len(rows))
        made = [*split_like(down, downs)]
        for own, like in zip(ups, groups, strict=True):
            made += split_like(own.view(-1), like)
        return made

    def split(self, rows: Rows, joined: Tensor) -> Sequence[Tensor]:
        """Each layer's part of a vector over the channels of such rows."""
        if isinstance(rows, int):
            return torch.split(joined, self.widths)
        parts = torch.split(joined, [len(rows) * width for width in self.widths])
        return [part.view(len(rows), -1) for part in parts]

    def joined(self, rows: Rows, vectors: Iterable[Tensor | None]) -> Tensor:
        """The other way round, with zeros where there is none."""
        count = 1 if isinstance(rows, int) else len(rows)
        zeros = self.base.new_zeros(count * max(self.widths))
        each = zip(vectors, self.widths, strict=True)
        return join([zeros[: count * width] if v is None else v for v, width in each])

    def empty(self, rows: Rows, *, fill: bool) -> list[Tensor]:
        """Buffers of A and B for such rows, with zeros where they are not filled afterwards."""
        count, new = 1 if isinstance(rows, int) else len(rows), torch.zeros if fill else torch.empty
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        down = sum(side.layers * side.rank * side.fan_in for side in self.sides)
        ranks = zip(self._rows, self._ranks, strict=True)
        return [
            new(count * down, **options),
            *(new(count * own, rank, **options) for own, (rank, _) in ranks),
        ]

    def shapes_of(self, rows: Rows) -> list[Tensor]:
        """Shapes of what `cut` gives, as tensors without memory."""
        parts = self._shaped(None if isinstance(rows, int) else len(rows))
        return [like for part in parts for like in part]

    def _shaped(self, rows: int | None) -> list[list[Tensor]]:
        """Shapes that buffers are cut into, as tensors without memory: of A, and of each rank's B.

        Of so many rows; None: as the layer has them.
        """
        if rows not in self._templates:
            front = [] if rows is None else [rows]

            def ones(site: Site) -> list[int]:
                return [1] * (site.weight.ndim - 2 if rows is None else 0)

            shapes = [[(*front, s.rank, *s.weight.shape[1:]) for s in self.sites]]
            for _, group in groupby(self.sites, key=lambda site: site.rank):
                shapes.append([(*front, s.out, s.rank, *ones(s)) for s in group])
            self._templates[rows] = [
                [torch.empty(shape, device="meta") for shape in part] for part in shapes
            ]
        return self._templates[rows]


class _Sides(NamedTuple):
    """Common properties of layers of one shape.

    Attributes:
        layers: How many they are.
        rank, out, width: As `Site` has them.
        fan_in: Numbers of a row of the weight.
        scale: ``s``; None where the K adapters of a layer differ in it.
    """

    layers: int
    rank: int
    out: int
    width: int
    fan_in: int
    scale: float | None

    @classmethod
    def of(cls, sites: Sequence[Site]) -> _Sides:
        first, scales = sites[0], {adapter.scale for adapter in sites[0].adapters}
        scale = scales.pop() if len(scales) == 1 else None
        fan_in = first.weight.shape[1:].numel()
        return cls(len(sites), first.rank, first.out, first.width, fan_in, scale)


def layouts_of(sites: Sequence[Site]) -> dict[tuple[Any, ...], Layout]:
    """One for each device, precision, norm axis and the like, by what tells them apart."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for number, site in enumerate(sites):
        kinds.setdefault(_division(site), []).append(number)
    return {kind: Layout(sites, numbers) for kind, numbers in kinds.items()}


def _division(site: Site) -> tuple[Any, ...]:
    """Return the properties that all layers of one layout share."""
    first = site.adapters[0]
    axis = None if first.magnitude is None else first.norm_axis
    return site.weight.device, upcast_dtype(site.weight), site.shard is None, axis


def _kind(site: Site) -> tuple[Any, ...]:
    """Return the sort key of layers; those with equal keys have their norms computed together."""
    # The shape of the whole weight: processes that share it must agree on the order.
    shape = site.out, *site.weight.shape[1:]
    scales = tuple(adapter.scale for adapter in site.adapters)
    return site.rank, shape, scales, str(site.weight.dtype)


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
    """Return the indices of the layers that own the flagged channels of a concatenated vector."""
    ends = list(accumulate(sizes))
    return {bisect_right(ends, channel) for channel in flagged.nonzero().flatten().tolist()}
