"""Inputs that need not be kept for the backward pass, since what is kept anyway makes them again.

A norm and an activation keep their own input. A layer behind one can keep that same tensor, and
compute its input from it once more, at the price of a pass over memory. That pays for the outputs
that the gradient of DoRA's magnitude needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Recipe:
    """How an input is made again.

    Several layers may share one, as queries, keys and values do: the first of them in the backward
    pass computes, and the last one lets go. Where one of them has no backward pass, the input is
    held until the graph goes.
    """

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self._make = make
        self._users = 0
        self._made: Tensor | None = None

    def add_user(self) -> None:
        """Count a layer that will ask for its input."""
        self._users += 1

    def remake(self, kept: Tensor) -> Tensor:
        """The input, bit for bit, from what was kept, ``Source.tensor``."""
        made = self._make(kept) if self._made is None else self._made
        self._users -= 1
        self._made = made if self._users > 0 else None
        return made


class Source(NamedTuple):
    """A tensor that is kept anyway, and how an input follows from it."""

    tensor: Tensor
    recipe: Recipe
