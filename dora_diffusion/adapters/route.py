"""Path of an input through the adapters of one layer while a scope is open.

A layer has one route, or None outside of scopes. Everything that a scope prepares for the layer is
in its route, so that a scope ends by taking the routes away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dora_diffusion.numerics.dora import Factors

Ready = Callable[[Tensor], Tensor]
"""Forward of a layer, for an input that needs no preparation."""


class Scales(Protocol):
    """Norms of one adapter on one layer: `LayerScales`, `FixedScales`, or a `StackRoute`."""

    @property
    def factors_by_dtype(self) -> Mapping[torch.dtype, Factors]:
        """Factors that were made already, the only ones that a compiled layer can use."""

    def factors(self, dtype: torch.dtype) -> Factors:
        """Return the factors in a dtype."""


class Route:
    """Interface of a route.

    Attributes:
        norms: Scales of each adapter, by its name on the layer.
        ready: Forward of the layer by input dtype, where neither input nor weight needs to be
            prepared. Outside of autocast the layer calls it in place of `forward`.
    """

    norms: dict[str, Scales]
    ready: Mapping[torch.dtype, Ready]

    @property
    def is_mixed(self) -> bool:
        """True if the rows of a batch use several adapters, or none."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for an input that is not `ready`."""
        raise NotImplementedError

    def scales(self, name: str, adapter: Any) -> Scales | None:
        """Return the scales of an adapter; None for a LoRA that changed in its scope."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make the factors, which a compiled layer cannot make itself."""
        raise NotImplementedError

    def forget(self, name: str | None = None) -> None:
        """Drop the scales of a changed adapter, or of all adapters."""
        if name is None:
            self.norms.clear()
        else:
            self.norms.pop(name, None)


@contextmanager
def routed(layers: Sequence[nn.Module], routes: Sequence[Route]) -> Iterator[None]:
    """Send the inputs of layers along routes inside the block, and as before after it."""
    before = [cast(Any, layer).route for layer in layers]
    # Past `nn.Module.__setattr__`, which would take longer than everything else here.
    for layer, route in zip(layers, routes, strict=True):
        object.__setattr__(layer, "route", route)
    try:
        yield
    finally:
        for layer, previous in zip(layers, before, strict=True):
            if hasattr(layer, "route"):  # It may have lost its last adapter.
                object.__setattr__(layer, "route", previous)
