"""Order of many layers' parameters, for operations on all of them at once.

All A lie one after the other in one vector, all B in a second one, and magnitudes and gains in
further ones. Layers of one shape are neighbours. The order depends on shapes and settings only, so
a loop computes it once. If layers have K adapters each (`pack`), the adapters of a layer are
neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.adapters.flat import consecutive, join, split_like
from dora_diffusion.adapters.site import Site
from dora_diffusion.numerics.norms import widens
from dora_diffusion.numerics.precision import upcast_dtype

A, B, VECTOR = range(3)
"""Kinds of vectors: of all A, of all B, or of a number for each channel."""
Rows = int | tuple[int, ...]
"""The index among K adapters for each row of a batch; a number if all rows have the same."""


class Layout:
    """Layout of layers of one `_division`, each with K adapters.

    Attributes:
        sites: Layers with their adapters; layers of one shape are neighbours.
        numbers: Index of each site in the argument ``sites``.
        count: K.
        axis: Axis of the norm.
        has_gain: Whether the adapters are DoRA, not LoRA.
        groups: Neighbours with equal rank, shape, scales and dtype, whose norms are computed
            together.
        shapes: `Site.shapes` of each group.
        widens: Whether products with the weights of a group can be float32 (`norms.widens`).
        group_scales: ``s`` of each group; None if the K adapters of a layer differ in it.
        ranks: Each rank with the number of its rows of B, which are one matrix.
        scales: ``s`` of each row of B, ``(rows, 1)``; None if all are 1.
        widths: Number of magnitudes per adapter of each layer; 0 for LoRA.
        sizes: The same for each adapter of each layer.
        direct: Indices of layers that multiply by the gain in the graph (`Factors.gain_in_graph`).
        bias: Biases in the dtype of the norms, 0 where a layer has none; None if no gain may scale
            a bias.
        biases: Views of the layers' biases, or None.
        roles: All A, all B and all m, layer by layer and adapter by adapter.
        parameters: The same in one list.
        has_other_dtypes: Whether a parameter has another dtype than the norms.
        is_padded: Whether the K adapters of a layer differ in rank.
        anchor: Root of a graph that has no edges to the parameters.
        selections: Cache of `pack.pack_rows`.
    """

    def __init__(self, sites: Sequence[Site], numbers: Sequence[int]) -> None:
        self.numbers = list(numbers)
        self.sites = sites = [sites[number] for number in numbers]
        adapters = [adapter for site in sites for adapter in site.adapters]
        first, self.count = adapters[0], len(sites[0].adapters)
        self.axis, self.has_gain = first.norm_axis, first.magnitude is not None
        self.dtype, self.device = upcast_dtype(sites[0].weight), sites[0].weight.device
        self.groups = [list(group) for _, group in groupby(sites, key=_kind)]
        self.shapes = [group[0].shapes for group in self.groups]
        self.widens = [widens(group[0].weight) for group in self.groups]
        scales = [{adapter.scale for adapter in group[0].adapters} for group in self.groups]
        self.group_scales = [distinct.pop() if len(distinct) == 1 else None for distinct in scales]
        self.widths = [site.width for site in sites]
        self.sizes = [width for width in self.widths for _ in range(self.count)]
        self.direct = {index for index, site in enumerate(sites) if site.gain_in_graph}
        magnitudes = [a.magnitude for a in adapters if a.magnitude is not None]
        self.roles = [a.down for a in adapters], [a.up for a in adapters], magnitudes
        self.parameters = [parameter for role in self.roles for parameter in role]
        self.has_other_dtypes = any(p.dtype != self.dtype for p in self.parameters)
        self.is_padded = any(a.rank < site.rank for site in sites for a in site.adapters)
        # Neighbours of equal rank; their B are the rows of one matrix.
        ranks = groupby(sites, lambda site: site.rank)
        self.ranks = [(rank, self.count * sum(site.out for site in group)) for rank, group in ranks]
        self.scales: Tensor | None = None
        if any(adapter.scale != 1 for adapter in adapters):
            pairs = [(adapter.scale, len(adapter.up)) for adapter in adapters]
            values, rows = torch.tensor(pairs, dtype=torch.float64).unbind(1)
            total = sum(rows for _, rows in self.ranks)
            values = values.repeat_interleave(rows.long(), output_size=total)
            self.scales = values[:, None].to(self.dtype).to(self.device)
        self.anchor = torch.zeros((), requires_grad=True)
        self.selections: dict[Rows, Any] = {}
        self._memory: list[Tensor | None] = [None, None, None]
        self._new_bias()
        self.update_statistics()

    def _new_bias(self) -> None:
        """Allocate the biases, which are read with one operation if they have the same dtype."""
        is_scaled = self.has_gain and self.axis == "output"
        biases = [site.bias if is_scaled else None for site in self.sites]
        self.bias: Tensor | None = None
        self.biases: list[Tensor | None] = [None for _ in biases]
        if dtypes := [bias.dtype for bias in biases if bias is not None]:
            zeros = torch.zeros(max(self.widths), dtype=dtypes[0], device=self.device)
            pairs = zip(biases, self.widths, strict=True)
            vectors = [zeros[:width] if bias is None else bias for bias, width in pairs]
            self._bias_vectors = [vector for vector in vectors for _ in range(self.count)]
            with torch.inference_mode(False):  # Later steps write to it.
                self.bias = torch.zeros(sum(self.sizes), dtype=self.dtype, device=self.device)
            views = torch.split(self.bias, self.sizes)[:: self.count]
            self.biases = [None if b is None else v for b, v in zip(biases, views, strict=True)]

    def update_bias(self) -> None:
        """Read the current biases."""
        if self.bias is not None:
            self.bias.copy_(torch.cat(self._bias_vectors))

    @torch.no_grad()
    def update_statistics(self) -> None:
        """Read the current statistics of the weights."""
        if self.has_gain:
            statistics = [site.statistics for site in self.sites if site.statistics is not None]
            norms = [s.squared_norm for s in statistics]
            self.base = torch.cat([norm for norm in norms for _ in range(self.count)])
            self.recorded = torch.cat([s.checksum for s in statistics])
            self.recorded_base = torch.cat(norms)

    # Parameters to vectors

    def read_in_place(self) -> None:
        """Read parameters that lie one after the other in their memory, which must not move."""
        self._memory = [consecutive(role) if role else None for role in self.roles]

    @torch.no_grad()
    def joined(self, kind: int) -> Tensor:
        """Return the vector of all A, B or m."""
        memory = self._memory[kind]
        return (join(self.roles[kind]) if memory is None else memory).to(self.dtype)

    def row_scales(self, gain: Tensor | None) -> Tensor | None:
        """Return the scales of B's rows: ``g s`` on the output axis, else `scales`."""
        if gain is None or self.axis == "input":
            return self.scales
        return gain[:, None] if self.scales is None else gain[:, None] * self.scales

    def scale_rows(self, up: Tensor, scales: Tensor, out: Tensor) -> None:
        """Multiply the rows of B by their scales. ``out`` may be ``up``."""
        parts = [torch.split(v, [rank * rows for rank, rows in self.ranks]) for v in (up, out)]
        of_ranks = torch.split(scales, [rows for _, rows in self.ranks])
        for (rank, _), source, target, scale in zip(self.ranks, *parts, of_ranks, strict=True):
            torch.mul(source.view(-1, rank), scale, out=target.view(-1, rank))

    # Vectors to layers

    def new_vectors(
        self, count: int = 1, *, zero: bool = False, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Return new vectors of all A and all B.

        Args:
            count: Number of adapters of each layer.
            zero: Fill them with zeros.
            dtype: Dtype. Default: that of the norms.
        """
        new = partial(torch.zeros if zero else torch.empty, device=self.device)
        sizes = [sum(map(prod, self._shapes(kind, count))) for kind in (A, B)]
        return [new(size, dtype=dtype or self.dtype) for size in sizes]

    def _shapes(self, kind: int, count: int) -> list[tuple[int, ...]]:
        pairs = zip(self.groups, self.shapes, strict=True)
        return [(len(group) * count, *shapes[kind]) for group, shapes in pairs]

    def by_group(self, vector: Tensor, kind: int, count: int | None = None) -> list[Tensor]:
        """View a vector as a tensor for each group, with an entry per adapter of each layer.

        Args:
            vector: The vector.
            kind: Its kind.
            count: Number of adapters of each layer. None: K.
        """
        shapes = self._shapes(kind, count or self.count)
        parts = torch.split(vector, [prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def views(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """View vectors of A, B and any others as a tensor for each layer with one adapter.

        A is ``(r, in, *k)`` and B ``(out, r, *1)``.
        """
        pairs = zip(vectors, self.roles[:VECTOR], strict=False)
        views = [part for vector, role in pairs for part in split_like(vector, role)]
        return views + [p for v in vectors[VECTOR:] for p in torch.split(v.detach(), self.widths)]

    def with_zeros(self, vectors: Sequence[Tensor | None], count: int = 1) -> list[Tensor]:
        """Replace None among the vectors of layers, for so many adapters each, by zeros."""
        given = [vector for vector in vectors if vector is not None]
        if len(given) == len(vectors):
            return given
        zeros = self.base.new_zeros(count * max(self.widths))
        pairs = zip(vectors, self.widths, strict=True)
        return [zeros[: count * width] if v is None else v for v, width in pairs]


def layouts_of(sites: Sequence[Site]) -> dict[tuple[Any, ...], Layout]:
    """Return a layout for each `_division` (device, precision, norm axis) of the sites."""
    return {kind: Layout(sites, numbers) for kind, numbers in _divided(sites).items()}


def layout_order(sites: Sequence[Site]) -> list[int]:
    """Return the indices of the sites in the order of their layouts."""
    return [number for numbers in _divided(sites).values() for number in numbers]


def _divided(sites: Sequence[Site]) -> dict[tuple[Any, ...], list[int]]:
    """Return the sorted indices of the sites of each division."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for number, site in enumerate(sites):
        kinds.setdefault(_division(site), []).append(number)
    return {
        kind: sorted(numbers, key=lambda number: _kind(sites[number]))
        for kind, numbers in kinds.items()
    }


def _division(site: Site) -> tuple[Any, ...]:
    """Return the properties that all layers of one layout share."""
    first = site.adapters[0]
    axis = None if first.magnitude is None else first.norm_axis
    return site.weight.device, upcast_dtype(site.weight), site.shard is None, axis


def _kind(site: Site) -> tuple[Any, ...]:
    """Return the sort key of layers; those with equal keys have their norms computed together."""
    # The whole weight's shape, since processes that share it must agree on the order.
    shape = site.out, *site.weight.shape[1:]
    scales = tuple(adapter.scale for adapter in site.adapters)
    return site.rank, shape, scales, str(site.weight.dtype)
