"""Path of an input through the adapters of one layer while a scope is open.

A layer has one route, or None outside of scopes. Everything that a scope prepares for the layer is
in its route, so that a scope ends by taking the routes away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from dora_diffusion.adapters.layers import Active, AdaptedLayer, LayerAdapter
from dora_diffusion.adapters.plan import make_scales
from dora_diffusion.numerics.dora import Factors, dora_forward
from dora_diffusion.numerics.operation import MaskedOperation, Operation, RowOperation
from dora_diffusion.numerics.precision import product_dtype

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
    """Route of a layer in a `norm_scope`: all active adapters, each with the norm of the scope.

    Args:
        layer: The layer.

    Attributes:
        norms: Scales of each adapter, by its name on the layer.
        ready: Forward of the layer by input dtype, where neither input nor weight needs to be
            prepared. Outside of autocast the layer calls it in place of `forward`.
    """

    def __init__(self, layer: AdaptedLayer) -> None:
        self.layer = layer
        self.norms: dict[str, Scales] = {}
        self.ready: Mapping[torch.dtype, Ready] = {}
        # Apart from the norms, which compiled layers read and guard.
        self._versions: dict[str, tuple[int, ...]] = {}

    @property
    def is_mixed(self) -> bool:
        """True if the rows of a batch use several adapters, or none."""
        return False

    def active(self) -> Active:
        """Return the adapters that change the output of any row."""
        return self.layer.active()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for an input that is not `ready`."""
        return self.layer.adapted(x, self.active())

    def prepare(self) -> None:
        """Make the factors, which a compiled layer cannot make itself."""
        for name, adapter in self.active() if self.norms else ():
            if (scales := self.scales(name, adapter)) is not None:
                scales.factors(product_dtype(self.layer.weight))

    def scales(self, name: str, adapter: LayerAdapter) -> Scales | None:
        """Return the scales of an adapter; None for a LoRA that changed in its scope."""
        if name in self.norms:
            if self.require_unchanged(name, adapter):
                return self.norms[name]
            del self.norms[name]
        if adapter.magnitude is None:
            return None
        scales = make_scales([self.layer.site([adapter])])[0]
        self.keep(name, adapter, scales)
        return scales

    def keep(self, name: str, adapter: LayerAdapter, scales: Scales) -> None:
        """Keep the scales of an adapter until the scope ends."""
        self.norms[name], self._versions[name] = scales, adapter.versions()

    def require_unchanged(self, name: str, adapter: LayerAdapter) -> bool:
        """Return whether an adapter still matches its kept scales; a DoRA must.

        Raises:
            RuntimeError: If a parameter of a DoRA was written or replaced since.
        """
        is_unchanged = adapter.versions() == self._versions[name]
        if not is_unchanged and adapter.magnitude is not None:
            raise RuntimeError(
                "an adapter's parameters changed inside norm_scope, which keeps the norms of what "
                "they were: open one norm_scope for each optimizer step, around its forward and "
                "backward passes; whatever changes parameters, such as optimizer.step(), call it "
                "after it"
            )
        return is_unchanged

    def forget(self, name: str | None = None) -> None:
        """Drop the scales of a changed adapter, or of all adapters."""
        if name is None:
            self.norms.clear()
        else:
            self.norms.pop(name, None)


def forward_rows(
    op: Operation, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`dora_forward` of a batch whose rows have an adapter each.

    One product with the weight serves all rows, and the low-rank products are batched.

    Args:
        op: Operation of a Linear layer, or of a Conv2d without groups.
        x: As in `dora_forward`.
        weight: Likewise.
        bias: Likewise.
        factors: Factors of each row, stacked (`RowOperation`).
        mask: Factor of each rank of each row (`MaskedOperation`); None: all are 1.
    """
    rows: Operation = RowOperation(op, x.ndim, len(factors.down))
    rows = rows if mask is None else MaskedOperation(rows, mask)
    return dora_forward(rows, x, weight, bias, factors)


@contextmanager
def routed(layers: Sequence[AdaptedLayer], routes: Sequence[Route]) -> Iterator[None]:
    """Send the inputs of layers along routes inside the block, and as before after it."""
    before = [layer.route for layer in layers]
    # Past `nn.Module.__setattr__`, which would take longer than everything else here.
    for layer, route in zip(layers, routes, strict=True):
        object.__setattr__(layer, "route", route)
    try:
        yield
    finally:
        for layer, previous in zip(layers, before, strict=True):
            if isinstance(layer, AdaptedLayer):  # It may have lost its last adapter.
                object.__setattr__(layer, "route", previous)
