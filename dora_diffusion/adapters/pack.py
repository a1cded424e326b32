"""Rows of a batch that use different ones of the K adapters of a pack.

The number of operations, except products with W, does not depend on K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dora_diffusion.adapters.layout import VECTOR, Layout, Rows


class PackRows:
    """Selection of a layout's K adapters for the rows of a batch.

    Layers get ``down (N, r, in, *k)``, ``up (N, out, r)`` and vectors ``(N, n)`` (`RowOperation`),
    or the tensors of one adapter if ``rows`` is a number.

    Args:
        layout: The layout.
        rows: The adapters of the rows.
    """

    def __init__(self, layout: Layout, rows: Rows) -> None:
        self._layout, self._is_one = layout, isinstance(rows, int)
        self._is_whole = rows == tuple(range(layout.count))
        self._index = torch.tensor([rows] if isinstance(rows, int) else rows).to(layout.device)
        self._selected = rows if isinstance(rows, int) else self._index

    def views(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """View vectors for these rows as a tensor for each layer."""
        return self._of_layers(vectors, len(self._index), 0 if self._is_one else None)

    def gather(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return each layer's tensors for these rows, from vectors of all adapters."""
        if self._is_whole:
            return self.views(vectors)
        return self._of_layers(vectors, self._layout.count, self._selected)

    def _of_layers(
        self, vectors: Sequence[Tensor], count: int, selected: int | Tensor | None
    ) -> list[Tensor]:
        """Return each layer's tensors, from vectors of so many adapters per layer.

        Args:
            vectors: The vectors.
            count: The number of adapters.
            selected: Index of one of them, or a vector of indices. None: all.
        """
        tensors = list[Tensor]()
        for number, vector in enumerate(vectors):
            groups = self._layout.by_group(vector, min(number, VECTOR), count)
            for (site, *_), entries in zip(self._layout.groups, groups, strict=True):
                ones = [1] * (site.weight.ndim - 2) if self._is_one else []
                shapes = (site.rank, *site.weight.shape[1:]), (site.out, site.rank, *ones)
                shape = [*shapes, (site.width,)][min(number, VECTOR)]
                of_layers = entries.view(-1, count, *shape)
                if isinstance(selected, int):
                    of_layers = of_layers[:, selected]
                elif selected is not None:
                    of_layers = of_layers.index_select(1, selected)
                tensors += of_layers.unbind()
        return tensors

    def add_up(self, vectors: list[Tensor]) -> list[Tensor]:
        """Return vectors of all adapters, each the sum over the rows that use it."""
        if self._is_whole:
            return vectors
        layout = self._layout
        sums = layout.new_vectors(layout.count, zero=True)
        sums += [torch.zeros_like(layout.base) for _ in vectors[VECTOR:]]
        for kind, (total, vector) in enumerate(zip(sums, vectors, strict=True)):
            groups = layout.by_group(total, kind), layout.by_group(vector, kind, len(self._index))
            for of_adapters, of_rows in zip(*groups, strict=True):
                sums_of_layers = torch.unflatten(of_adapters, 0, (-1, layout.count))
                rows_of_layers = torch.unflatten(of_rows, 0, (-1, len(self._index)))
                sums_of_layers.index_add_(1, self._index, rows_of_layers)
        return sums


def pack_rows(layout: Layout, rows: Rows) -> PackRows:
    """Return the selection of a layout's adapters for these rows, cached."""
    if rows not in layout.selections:
        layout.selections[rows] = PackRows(layout, rows)
    selection: PackRows = layout.selections[rows]
    return selection


@torch.no_grad()
def padded_factors(layout: Layout) -> list[Tensor]:
    """Return the vectors of all A and all B, padded with zeros to the largest rank of a layer."""
    vectors = layout.new_vectors(layout.count, zero=True)
    groups = [g for kind, vector in enumerate(vectors) for g in layout.by_group(vector, kind)]
    sources = [factor.flatten(1) for role in layout.roles[:VECTOR] for factor in role]
    pairs = zip((part for group in groups for part in group), sources, strict=True)
    torch._foreach_copy_([part[: len(s), : s.shape[1]] for part, s in pairs], sources)
    return vectors


def pieces_of(layout: Layout, sums: Sequence[Tensor]) -> list[Tensor]:
    """View sums with the shapes of `Layout.parameters`, which may have smaller ranks."""
    groups = [g for kind, total in enumerate(sums[:VECTOR]) for g in layout.by_group(total, kind)]
    pieces = [piece for group in groups for piece in group.unbind()]
    for vector in sums[VECTOR:]:
        pieces += torch.split(vector, layout.sizes)
    return [
        piece
        if piece.shape == parameter.shape
        else piece[: len(parameter), : parameter.shape[1:].numel()].view(parameter.shape)
        for piece, parameter in zip(pieces, layout.parameters, strict=True)
    ]
