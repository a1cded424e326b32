"""Norms of sharded weights: no process holds a whole weight, and each adds its part of the sums.

On the output axis each process computes the norms of its rows, on the input axis its summand of
every norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dora_diffusion.numerics.norms import Terms, exact_squared_norm
from dora_diffusion.numerics.weights import LayerWeights, NormAxis


class RowShard(NamedTuple):
    """Rows (outputs) of a sharded weight that this process holds.

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

    def sum_terms(self, terms: Terms) -> Terms:
        """Sum the terms of norms over all processes."""
        squares = self.add_up(torch.cat([terms.change, terms.bound.square(), terms.checksum]))
        change, bound, checksum = torch.split(squares, [len(term) for term in terms])
        return Terms(change, bound.sqrt(), checksum)

    def exact_norm(self, weight: Tensor, adapter: LayerWeights) -> Tensor:
        """Compute ``norm(W + s B A)`` per channel from the dense sums of all processes."""
        up, axis = self.own(adapter.up), adapter.norm_axis
        part = exact_squared_norm(weight, adapter.down, up, adapter.scale, axis)
        return self.add_up(self.partial_sum(part, axis)).sqrt()
