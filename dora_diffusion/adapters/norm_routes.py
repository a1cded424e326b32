"""Routes of a layer in a norm scope: all of its adapters, or an adapter for each row of a batch.

With the norm detached (paper, section 4.3), an adapted layer computes ``g_k (W x + b) + B'_k (A_k
x)`` and a shift. All rows share the dense product; only the small products differ between adapters,
and these are batched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.adapters.layers import Active, AdaptedLayer, LayerAdapter
from dora_diffusion.adapters.route import Ready, Route, Scales
from dora_diffusion.numerics.dora import Factors, dora_forward
from dora_diffusion.numerics.precision import product_dtype


class NormRoute(Route):
    """Route of a layer in a `norm_scope`: all active adapters act on all rows.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: AdaptedLayer) -> None:
        self.layer = layer
        self.norms: dict[str, Scales] = {}
        self.ready: Mapping[torch.dtype, Ready] = {}
        # Separate from the norms, which compiled layers read and guard.
        self._versions: dict[str, tuple[int, ...]] = {}

    def active(self) -> Active:
        """Return the adapters that change the output of at least one row."""
        return self.layer.active()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.adapted(x, self.active())

    def prepare(self) -> None:
        for name, adapter in self.active() if self.norms else ():
            if (scales := self.scales(name, adapter)) is not None:
                scales.factors(product_dtype(self.layer.weight))

    def scales(self, name: str, adapter: LayerAdapter) -> Scales | None:
        if name in self.norms:
            if self.check_unchanged(name, adapter):
                return self.norms[name]
            del self.norms[name]
        if (scales := self.layer.computed_scales(adapter)) is not None:
            self.keep(name, adapter, scales)
        return scales

    def keep(self, name: str, adapter: LayerAdapter, scales: Scales) -> None:
        """Keep the scales of an adapter until the scope ends."""
        self.norms[name], self._versions[name] = scales, adapter.versions()

    def check_unchanged(self, name: str, adapter: LayerAdapter) -> bool:
        """Return whether an adapter is unchanged since its scales were computed; a DoRA must be.

        Raises:
            RuntimeError: If a parameter of a DoRA was written or replaced.
        """
        is_unchanged = adapter.versions() == self._versions[name]
        if not is_unchanged and adapter.magnitude is not None:
            raise RuntimeError(
                "an adapter's parameters changed inside norm_scope, which caches their norms; open "
                "one norm_scope for each optimizer step, around its forward and backward passes, "
                "and change parameters after it, as optimizer.step() does"
            )
        return is_unchanged


class RowRoute(NormRoute):
    """Route of a layer in a `row_scope`.

    Args:
        layer: The layer.
        names: Adapter of each row; None is the base. They are repeated for a batch of a multiple of
            this size, as in guidance.
    """

    is_mixed = True

    def __init__(self, layer: AdaptedLayer, names: tuple[str | None, ...]) -> None:
        super().__init__(layer)
        if isinstance(layer.route, NormRoute):
            self.norms, self._versions = layer.route.norms, layer.route._versions
        self.names = names
        self._factors: dict[tuple[Any, ...], Factors | None] = {}

    def active(self) -> Active:
        return [pair for pair in self.layer.active() if pair[0] in self.names]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, each row with its own adapter.

        Raises:
            ValueError: If the batch's size is not a multiple of the number of rows.
        """
        layer, active = self.layer, self.active()
        if len(set(self.names)) == 1 or not active or layer.is_merged:
            return layer.adapted(x, active)
        is_batch = layer.kind == "embedding" or x.ndim >= layer.weight.ndim
        repeats, rest = divmod(batch := len(x) if is_batch else 1, len(self.names))
        if rest or not repeats:
            raise ValueError(
                f"a layer is called with a batch of {batch}, but adapters are given for "
                f"{len(self.names)} rows; give one per row of the batch"
            )
        names = self.names * repeats
        if _are_batched(layer, active):
            inputs, matrix, bias = layer.operands(x)
            assert isinstance(inputs, Tensor)
            if (factors := self._factors_of_rows(active, names, inputs.dtype)) is not None:
                return dora_forward(layer.operation(), inputs, matrix, bias, factors)
        return _each_by_itself(layer, x, names, active)

    def forget(self, name: str | None = None) -> None:
        super().forget(name)
        self._factors.clear()

    def _factors_of_rows(
        self, active: Active, names: Sequence[str | None], dtype: torch.dtype
    ) -> Factors | None:
        """Return each row's factors, stacked; None if m needs its gain in the graph."""
        layer, used = self.layer, [(name, adapter.strengths.strength) for name, adapter in active]
        key = (dtype, len(names), torch.is_grad_enabled(), *used)
        for name, adapter in active:
            if name in self.norms and not self.check_unchanged(name, adapter):
                self._factors.clear()
        if key not in self._factors:
            factors = {
                name: _folded(layer.factors(name, adapter, dtype), adapter.strengths.strength)
                for name, adapter in active
            }
            in_graph = torch.is_grad_enabled() and any(f.gain_in_graph for f in factors.values())
            self._factors[key] = None if in_graph else _stacked(factors, names)
        return self._factors[key]


def _are_batched(layer: AdaptedLayer, active: Active) -> bool:
    """Return whether one product can serve rows of all these adapters."""
    adapters = [adapter for _, adapter in active]
    axes = {adapter.norm_axis for adapter in adapters if adapter.magnitude is not None}
    # A strength is folded into the gain of the output, which then gives no gradient of m.
    folds = not torch.is_grad_enabled() and "input" not in axes
    return (
        layer.operation().is_plain
        and len(axes) < 2
        and all(folds or adapter.strengths.strength == 1 for adapter in adapters)
        and not (layer.training and any(adapter.dropout for adapter in adapters))
    )


def _folded(factors: Factors, strength: float) -> Factors:
    """Return factors of ``W x + strength * (W' x - W x)``; output axis or no magnitude only."""
    if strength == 1:
        return factors
    gain, shift = factors.gain, factors.shift
    return factors._replace(
        up=strength * factors.up,
        gain=None if gain is None else 1 + strength * (gain - 1),
        shift=None if shift is None else strength * shift,
    )


def _stacked(factors: dict[str, Factors], names: Sequence[str | None]) -> Factors:
    """Stack factors by row: ``down (N, r, in, *k)``, ``up (N, out, r)``, the others ``(N, n)``.

    Ranks are padded with zeros. A row without an adapter has zeros, and a gain of 1.
    """
    rank = max(len(f.down) for f in factors.values())
    padded = {
        name: f._replace(
            down=F.pad(f.down, (0, 0) * (f.down.ndim - 1) + (0, rank - len(f.down))),
            up=F.pad(f.up.flatten(1), (0, rank - len(f.down))),
        )
        for name, f in factors.items()
    }

    def stack(field: str, empty: float = 0.0) -> Any:
        tensors = {n: t for n, f in padded.items() if (t := getattr(f, field)) is not None}
        if not tensors:
            return None
        other = torch.full_like(next(iter(tensors.values())), empty, requires_grad=False)
        return torch.stack([tensors.get(name or "", other) for name in names])

    fields = stack("down"), stack("up"), stack("gain", 1.0), stack("shift")
    dora = max(factors.values(), key=lambda f: f.gain is not None)  # If there is one.
    return Factors(*fields, dora.mean, dora.axis)


def _each_by_itself(
    layer: AdaptedLayer, x: Tensor, names: Sequence[str | None], active: Active
) -> Tensor:
    """Return the layer's output, computed for one adapter's rows at a time."""
    outputs, rows_in_order = [], []
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        outputs.append(layer.adapted(x[rows], [pair for pair in active if pair[0] == name]))
        rows_in_order += rows
    order = torch.tensor(rows_in_order, device=x.device).argsort()
    return torch.cat(outputs).index_select(0, order)
