"""Memory layout of many layers' parameters, for operations on all of them at once.

One buffer holds all A, one after the other; one buffer per rank holds all B as rows; further
buffers hold vectors. Layers of one shape are neighbours, and so are the K adapters of a layer. The
number of operations, except products with W, does not depend on K. The order depends on shapes and
settings only, so a loop computes it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dora_diffusion.numerics.dora import squared_norm
from dora_diffusion.numerics.norms import checksum, widens
from dora_diffusion.numerics.precision import full_precision, upcast_dtype
from dora_diffusion.numerics.weights import LayerWeights, NormAxis

# Maximum number of cached row indices.
_KEPT = 8
# Maximum number of buffers after A and B: gains and shifts.
_VECTORS = 2


Rows = int | tuple[int, ...]
"""The index among K adapters for each row of a batch; a number if all rows have the same."""


class RowShard(NamedTuple):
    """Rows (outputs) of a sharded weight that this process holds.

    Squared norms need no process to hold the whole weight: on the output axis each process computes
    the norms of its rows, on the input axis its summand of every norm.

    Attributes:
        start: Index of the first row.
        length: Number of rows.
        out: Number of rows of the whole weight.
        add_up: Sums a tensor over all processes; the result is bitwise equal in each.
    """

    start: int
    length: int
    out: int
    add_up: Callable[[Tensor], Tensor]

    def own(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Narrow a tensor over all rows to the rows of this process."""
        return tensor.narrow(dim, self.start, self.length)

    def partial_sum(self, values: Tensor, axis: NormAxis) -> Tensor:
        """Return this process's summand for `add_up`, from ``(..., length)`` or ``(..., in)``."""
        if axis == "input":
            return values
        whole = values.new_zeros(*values.shape[:-1], self.out)
        self.own(whole, -1).copy_(values)
        return whole


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


@torch.no_grad()
def join(tensors: Sequence[Tensor]) -> Tensor:
    """Flatten and concatenate tensors, at least one, into a new vector."""
    joined: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return joined.clone() if len(tensors) == 1 else joined


@torch.no_grad()
def split_like(joined: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split the result of `join` into views with the shapes of the tensors."""
    views: Sequence[Tensor] = _unflatten_dense_tensors(joined.detach(), tensors)  # type: ignore[no-untyped-call]
    # In torch 2.6 empty tensors lose their shape and become (0,).
    return [p if p.numel() else p.view(t.shape) for p, t in zip(views, tensors, strict=True)]


def consecutive(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the tensors' memory as one vector; None if they do not lie one after the other."""
    first, total = tensors[0].detach(), 0
    storage, start = first.untyped_storage()._cdata, first.storage_offset()
    for tensor in tensors:
        follows = (
            tensor.untyped_storage()._cdata == storage
            and tensor.storage_offset() == start + total
            and tensor.is_contiguous()
            and tensor.dtype == first.dtype
        )
        if not follows:
            return None
        total += tensor.numel()
    return first.as_strided((total,), (1,))


class Layout:
    """Layout of layers of one `_division`, each with K adapters.

    The buffers are: all A, one after the other; all B of each rank, as rows ``(rows, r)``; and
    vectors over channels. In each buffer, the K adapters of a layer precede those of the next.

    Attributes:
        sites: Layers with their adapters; layers of one shape are neighbours.
        numbers: Index of each site in the argument ``sites``.
        count: K.
        whole: Rows that use the K adapters in order, one each.
        axis: Axis of the norm.
        has_gain: Whether the adapters are DoRA, not LoRA.
        shapes: Groups of neighbours with equal rank, shape, scales and dtype.
        shape_scales: ``s`` of each group; None if the K adapters of a layer differ in it.
        widens: Whether products with the weights of a group can be float32 (`norms.widens`).
        scales: ``s`` for each rank's rows of B: a number, or ``(rows, 1)`` if adapters differ.
        widths: Number of magnitudes per adapter of each layer; 0 for LoRA.
        sizes: The same for each adapter of each layer.
        has_bias: Whether a layer has a bias that its gain must not scale.
        direct: Indices of layers that multiply by the gain in the graph (`Factors.gain_in_graph`).
        bias: Biases of all adapters, in the dtype of the norms.
        biases: Views of the layers' biases; None for layers that `has_bias` excludes.
        parameters: All A, all B and all m, each layer by layer and adapter by adapter.
        has_other_dtypes: Whether a parameter has another dtype than the norms.
        is_derived: Whether a parametrization computes some of the parameters.
        downs: All A, followed by the zeros that pad them to a layer's rank.
        ups: All B of each rank.
        magnitudes: All m.
    """

    def __init__(self, sites: Sequence[Site], numbers: Sequence[int]) -> None:
        self.numbers = list(numbers)
        self.sites = sites = [sites[number] for number in numbers]
        first = sites[0].adapters[0]
        self.count = len(sites[0].adapters)
        self.whole: Rows = 0 if self.count == 1 else tuple(range(self.count))
        self.axis, self.has_gain = first.norm_axis, first.magnitude is not None
        self.dtype, self.device = upcast_dtype(sites[0].weight), sites[0].weight.device
        self.shapes = [list(group) for _, group in groupby(sites, key=_kind)]
        scales = [{adapter.scale for adapter in group[0].adapters} for group in self.shapes]
        self.shape_scales = [distinct.pop() if len(distinct) == 1 else None for distinct in scales]
        self.widens = [widens(group[0].weight) for group in self.shapes]
        # Neighbours of equal rank; their B are the rows of one matrix.
        self._ranks = [
            (rank, list(group)) for rank, group in groupby(sites, lambda site: site.rank)
        ]
        self._rows = [self.count * sum(site.out for site in group) for _, group in self._ranks]
        self.widths = [site.width for site in sites]
        self.sizes = [width for width in self.widths for _ in range(self.count)]
        on_output = self.has_gain and self.axis == "output"
        self.has_bias = [on_output and site.bias is not None for site in sites]
        self.direct = {index for index, site in enumerate(sites) if site.gain_in_graph}
        adapters = [adapter for site in sites for adapter in site.adapters]
        self.parameters = [a.down for a in adapters] + [a.up for a in adapters]
        self.magnitudes = [a.magnitude for a in adapters if a.magnitude is not None]
        self.parameters += self.magnitudes
        self.has_other_dtypes = any(p.dtype != self.dtype for p in self.parameters)
        self.is_derived = any(p.grad_fn is not None for p in self.parameters)
        self.downs = [part for rank, group in self._ranks for part in _filled_downs(rank, group)]
        self.ups = [[a.up for site in group for a in site.adapters] for _, group in self._ranks]
        self.scales = [self._scales_of(group) for _, group in self._ranks]
        self._new_bias()
        self._shared: dict[int, Tensor | None] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._templates: dict[int | None, list[list[Tensor]]] = {}
        self.update_statistics()

    @torch.no_grad()
    def update_statistics(self) -> None:
        """Read the current statistics of the weights."""
        if self.has_gain:
            statistics = [site.statistics for site in self.sites if site.statistics is not None]
            norms = [s.squared_norm for s in statistics]
            self.base = torch.cat([norm for norm in norms for _ in range(self.count)])
            self.recorded = torch.cat([s.checksum for s in statistics])
            self.recorded_base = torch.cat(norms)

    def update_bias(self) -> None:
        """Read the current biases, with zeros for layers without one."""
        if self._bias_vectors:
            self.bias.copy_(torch.cat(self._bias_vectors))

    def _new_bias(self) -> None:
        """Allocate the biases, which are read with one operation if they have the same dtype."""
        biases = [s.bias for s, has in zip(self.sites, self.has_bias, strict=True) if has]
        self._bias_vectors: list[Tensor] = []
        self.biases: list[Tensor | None] = [None] * len(self.sites)
        if biases:
            like = cast(Tensor, biases[0])
            zeros = torch.zeros(max(self.widths), dtype=like.dtype, device=self.device)
            triples = zip(self.sites, self.has_bias, self.widths, strict=True)
            vectors = [cast(Tensor, s.bias) if has else zeros[:w] for s, has, w in triples]
            self._bias_vectors = [vector for vector in vectors for _ in range(self.count)]
            with torch.inference_mode(False):  # Later steps write to it.
                self.bias = torch.zeros(sum(self.sizes), dtype=self.dtype, device=self.device)
            views = torch.split(self.bias, self.sizes)[:: self.count]
            self.biases = [v if has else None for v, has in zip(views, self.has_bias, strict=True)]

    def _scales_of(self, sites: Sequence[Site]) -> Tensor | float:
        adapters = [adapter for site in sites for adapter in site.adapters]
        scales = [adapter.scale for adapter in adapters]
        if len(set(scales)) == 1:
            return scales[0]
        rows = torch.tensor([len(adapter.up) for adapter in adapters])
        row_scales = torch.tensor(scales, dtype=torch.float64).repeat_interleave(rows)[:, None]
        return row_scales.to(self.dtype).to(self.device)

    @property
    def counts(self) -> list[int]:
        """Number of `parameters` in the buffers of A, of B for each rank, and of m."""
        sites = [len(self.sites), *(len(group) for _, group in self._ranks)]
        counts = [self.count * number for number in sites]
        return [*counts, len(self.magnitudes)]

    @property
    def has_buffers(self) -> bool:
        """True if the layers' factors can lie in `Buffers`: one DoRA each, on the output axis."""
        return self.count == 1 and self.has_gain and self.axis == "output"

    @cached_property
    def anchor(self) -> Tensor:
        """Root of a graph that has no edges to the parameters."""
        return torch.zeros((), requires_grad=True)

    # Parameters to buffers

    @torch.no_grad()
    def joined(self, tensors: Sequence[Tensor], *, shared: bool = False) -> Tensor:
        """Join `downs` or `magnitudes`.

        Args:
            tensors: The list.
            shared: Return the memory of the parameters, which must not move, if they lie there one
                after the other.
        """
        if shared and id(tensors) not in self._shared:
            self._shared[id(tensors)] = consecutive(tensors)
        memory = self._shared[id(tensors)] if shared else None
        return (join(tensors) if memory is None else memory).to(self.dtype)

    @torch.no_grad()
    def joined_ups(self, *, shared: bool = False) -> list[Tensor]:
        """Join `ups` as ``(rows, r)`` for each rank, padded with zeros to the rank."""
        buffers = []
        for (rank, _), ups in zip(self._ranks, self.ups, strict=True):
            if all(up.shape[1] == rank for up in ups):
                buffers.append(self.joined(ups, shared=shared).view(-1, rank))
                continue
            sizes = [len(up) for up in ups]
            rows = torch.zeros(sum(sizes), rank, dtype=self.dtype, device=self.device)
            pairs = zip(torch.split(rows, sizes), ups, strict=True)
            targets = [part[:, : up.shape[1]] for part, up in pairs]
            torch._foreach_copy_(targets, [up.flatten(1) for up in ups])
            buffers.append(rows)
        return buffers

    def row_scales(self, gain: Tensor | None) -> list[Any]:
        """Return the factors of each rank's rows of B: ``g s`` on the output axis, else ``s``."""
        if gain is None or self.axis == "input":
            return self.scales
        return scaled(torch.split(gain[:, None], self._rows), self.scales)

    # Buffers to layers, in the order A, B of each rank, and any vectors.

    @cached_property
    def _blocks(self) -> list[list[Any]]:
        """For each buffer and each group of `shapes`: number of layers, dimensions of each."""
        first = [(len(group), group[0]) for group in self.shapes]
        downs = [(n, site.rank, site.weight.shape[1:].numel()) for n, site in first]
        ups = [[(n, s.out, rank) for n, s in first if s.rank == rank] for rank, _ in self._ranks]
        vectors = [(n, site.width) for n, site in first]
        return [downs, *ups, *[vectors] * _VECTORS]

    def views_by_shape(
        self, buffers: Sequence[Tensor], count: int | None = None
    ) -> list[list[Tensor]]:
        """View each buffer as a tensor ``(n, count, ...)`` for each of `shapes`.

        A is ``(n, count, r, in * k)``, B ``(n, count, out, r)``.

        Args:
            buffers: Buffers of A, of B for each rank, and any vectors.
            count: Adapters of each layer in the buffers; None: K.
        """
        views = []
        for buffer, blocks in zip(buffers, self._blocks, strict=False):
            shapes = [(n, count or self.count, *dims) for n, *dims in blocks]
            cut = torch.split(buffer.view(-1), [prod(shape) for shape in shapes])
            views.append([part.view(shape) for part, shape in zip(cut, shapes, strict=True)])
        return views

    def factors_by_shape(self, down: Tensor, up: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        """`views_by_shape` of A and of B; for a sharded weight, the rows of B of this process."""
        downs, *by_rank = self.views_by_shape([down, *up])
        pairs = zip((up for ups in by_rank for up in ups), self.shapes, strict=True)
        return downs, [u if (s := group[0].shard) is None else s.own(u, 2) for u, group in pairs]

    def index(self, rows: Rows) -> Tensor:
        """Return the adapter index of each row, as a tensor on the device."""
        key = (rows,) if isinstance(rows, int) else rows
        if key not in self._indices:
            if len(self._indices) == _KEPT:
                self._indices.clear()
            self._indices[key] = torch.tensor(key).to(self.device)
        return self._indices[key]

    def views(self, rows: Rows, buffers: Sequence[Tensor]) -> list[Tensor]:
        """View buffers with this layout of rows as one tensor for each layer.

        If ``rows`` is a number, A is ``(r, in, *k)`` and B ``(out, r, *1)``. Otherwise A is
        ``(N, r, in, *k)`` and B ``(N, out, r)``.
        """
        pairs = zip(buffers, self._shaped(rows), strict=False)
        return [part for buffer, like in pairs for part in split_like(buffer.view(-1), like)]

    def gather(self, rows: Rows, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Return each layer's tensors for a batch with these rows, from buffers of the adapters."""
        if rows == self.whole:
            return self.views(rows, buffers)
        gathered: list[Tensor] = []
        for view in (view for views in self.views_by_shape(buffers) for view in views):
            is_one = isinstance(rows, int)
            selected = view[:, rows] if is_one else view.index_select(1, self.index(rows))
            gathered += selected.unbind()
        shapes = [like for group in self._shaped(rows)[: len(buffers)] for like in group]
        return [part.view(like.shape) for part, like in zip(gathered, shapes, strict=True)]

    def scatter_add(self, rows: Rows, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Return buffers of the K adapters, each the sum over the rows that use it."""
        if rows == self.whole:
            return list(buffers)
        index, sums = self.index(rows), self.new_buffers(self.whole, zero=True)
        sums += [torch.zeros_like(self.base) for _ in buffers[len(sums) :]]
        pairs = zip(
            self.views_by_shape(sums), self.views_by_shape(buffers, len(index)), strict=True
        )
        for totals, views in pairs:
            for total, view in zip(totals, views, strict=True):
                total.index_add_(1, index, view)
        return sums

    def with_zeros(self, rows: Rows, vectors: Sequence[Tensor | None]) -> list[Tensor]:
        """Replace None among the layers' vectors for these rows by zeros."""
        if all(vector is not None for vector in vectors):
            return cast(list[Tensor], list(vectors))
        count = 1 if isinstance(rows, int) else len(rows)
        zeros = self.base.new_zeros(count * max(self.widths))
        pairs = zip(vectors, self.widths, strict=True)
        return [zeros[: count * width] if v is None else v for v, width in pairs]

    def pieces(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """View buffers of A, of B for each rank and of m with the shapes of `parameters`."""
        products = buffers[: 1 + len(self._ranks)]
        views = self.views(self.whole, products)
        pieces = views if self.count == 1 else [piece for view in views for piece in view.unbind()]
        if self.has_gain:
            pieces = [*pieces, *torch.split(buffers[len(products)], self.sizes)]
        # A smaller rank, or the 1s of a convolution's shape.
        return [
            piece
            if piece.shape == parameter.shape
            else piece[: len(parameter), : parameter.shape[1]].view(parameter.shape)
            for piece, parameter in zip(pieces, self.parameters, strict=True)
        ]

    def new_buffers(self, rows: Rows, *, zero: bool) -> list[Tensor]:
        """Return new buffers of A and B for these rows, of zeros or uninitialized."""
        count, new = 1 if isinstance(rows, int) else len(rows), torch.zeros if zero else torch.empty
        downs, *ups = [sum(map(prod, blocks)) for blocks in self._blocks[: 1 + len(self._ranks)]]
        shapes: list[tuple[int, ...]] = [(count * downs,)]
        shapes += [(count * up // r, r) for up, (r, _) in zip(ups, self._ranks, strict=True)]
        return [new(shape, dtype=self.dtype, device=self.device) for shape in shapes]

    def _shaped(self, rows: Rows) -> list[list[Tensor]]:
        """Return meta tensors with the shapes of `views` for these rows."""
        key, front = (None, []) if isinstance(rows, int) else (len(rows), [len(rows)])
        if key not in self._templates:
            sites, ones = self.sites, [1] * (4 if key is None else 0)
            shapes: list[list[Any]] = [[(*front, s.rank, *s.weight.shape[1:]) for s in sites]]
            for rank, group in self._ranks:
                shapes.append([(*front, s.out, rank, *ones[: s.weight.ndim - 2]) for s in group])
            shapes += [[(*front, s.width) for s in sites]] * _VECTORS
            self._templates[key] = [
                [torch.empty(s, device="meta") for s in layer_shapes] for layer_shapes in shapes
            ]
        return self._templates[key]


def _filled_downs(rank: int, sites: Sequence[Site]) -> Iterator[Tensor]:
    """Yield all A of layers, followed by the zeros that pad them to the layers' rank."""
    for down in (adapter.down for site in sites for adapter in site.adapters):
        yield down
        if missing := rank - len(down):
            yield down.new_zeros(missing, down[0].numel())


def scaled(tensors: Iterable[Tensor], scales: Iterable[Any]) -> list[Tensor]:
    """Multiply tensors by their scales; a scale that is the number 1 returns the tensor itself."""
    pairs = zip(tensors, scales, strict=True)
    return [tensor if isinstance(s, float) and s == 1 else tensor * s for tensor, s in pairs]


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
