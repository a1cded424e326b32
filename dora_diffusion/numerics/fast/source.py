"""Inputs that need not be kept for the backward pass, since they are recomputed from what is kept.

A norm and an activation keep their own input. A layer behind one can keep that same tensor, and
recompute its input from it, at the price of a pass over memory. That pays for the outputs that the
gradient of DoRA's magnitude needs and LoRA's does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Recomputation:
    """How an input is recomputed.

    Several layers may share one, as queries, keys and values do: the first of them in the backward
    pass computes, and the last one lets go. Where one of them has no backward pass, the input is
    held until the graph goes.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        self._compute = compute
        self._users = 0
        self._result: Tensor | None = None

    def add_user(self) -> None:
        """Count a layer that will ask for its input."""
        self._users += 1

    def run(self, kept: Tensor) -> Tensor:
        """The input, bit for bit, from what was kept, ``Source.tensor``."""
        result = self._compute(kept) if self._result is None else self._result
        self._users -= 1
        self._result = result if self._users > 0 else None
        return result


class Source(NamedTuple):
    """A tensor that is kept anyway, and how an input is recomputed from it."""

    tensor: Tensor
    recomputation: Recomputation
