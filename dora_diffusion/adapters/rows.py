"""Rows of one batch that have different adapters: one product with W for all of them.

With the norm detached (paper, section 4.3), an adapted layer is ``g_k (W x + b) + B'_k (A_k x)``
and a shift: what differs between adapters is thin, and is batched beside the one dense product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.adapters.layers import AdaptedLayer, LayerAdapter
from dora_diffusion.numerics.dora import dora_forward
from dora_diffusion.numerics.operation import ConvOperation, Operation, RowOperation
from dora_diffusion.numerics.weights import Factors

Active = Sequence[tuple[str, LayerAdapter]]


@dataclass(frozen=True, eq=False)
class Rows:
    """Adapter of each row of a batch.

    Attributes:
        names: Of each row; None is the base. A batch of a multiple of so many rows repeats them,
            as guidance does.
    """

    names: tuple[str | None, ...]

    @cached_property
    def distinct(self) -> tuple[str | None, ...]:
        return tuple(dict.fromkeys(self.names))

    def of(self, batch: int) -> tuple[str | None, ...]:
        """The names of the rows of a batch.

        Raises:
            ValueError: If its size is not a multiple of theirs.
        """
        repeats, rest = divmod(batch, len(self.names))
        if rest or not repeats:
            raise ValueError(
                f"a layer is called with a batch of {batch}, and adapters are given for "
                f"{len(self.names)} rows; give one per row of the batch"
            )
        return self.names * repeats

    def forward(self, layer: AdaptedLayer, x: Tensor, active: Active) -> Tensor:
        """The output of a layer whose rows have different ones of its active adapters."""
        is_batch = layer.kind == "embedding" or x.ndim >= layer.weight.ndim
        names = self.of(len(x) if is_batch else 1)
        op = layer.operation()
        if not _are_batched(layer, op, active):
            return _each_by_itself(layer, x, names)
        inputs, matrix, bias = layer.operands(x)
        assert isinstance(inputs, Tensor)
        factors = _factors_of_rows(layer, active, names, inputs.dtype)
        if factors is None:
            return _each_by_itself(layer, x, names)
        own = RowOperation(op, inputs.ndim, len(names))
        return dora_forward(own, inputs, matrix, bias, factors)


def _are_batched(layer: AdaptedLayer, op: Operation, active: Active) -> bool:
    """Return whether one product serves these adapters; others run one adapter at a time."""
    is_plain = type(op) is Operation
    is_image = isinstance(op, ConvOperation) and op.groups == 1 and len(op.stride) == 2
    adapters = [adapter for _, adapter in active]
    axes = {adapter.norm_axis for adapter in adapters if adapter.magnitude is not None}
    # A strength is folded into what the output is multiplied by, which has no gradient of m then.
    folds = not torch.is_grad_enabled() and "input" not in axes
    return (
        (is_plain or is_image)
        and len(axes) < 2
        and all(folds or adapter.strengths.strength == 1 for adapter in adapters)
        and not (layer.training and any(adapter.dropout for adapter in adapters))
    )


def _factors_of_rows(
    layer: AdaptedLayer, active: Active, names: Sequence[str | None], dtype: torch.dtype
) -> Factors | None:
    """The factors of each row, stacked; None where the gradient of m needs a path of its own."""
    key = (dtype, len(names), torch.is_grad_enabled())
    for name, adapter in active:
        if name in (layer._scales_cache or {}) and not layer.require_unchanged(name, adapter):
            layer._row_factors.clear()
    if key not in layer._row_factors:
        own = {
            name: _folded(layer.factors(name, adapter, dtype), adapter.strengths.strength)
            for name, adapter in active
        }
        trains = torch.is_grad_enabled() and any(f.gain is not None for f in own.values())
        is_direct = trains and any(f.is_direct for f in own.values())
        layer._row_factors[key] = None if is_direct else _stacked(own, names)
    return layer._row_factors[key]


def _folded(factors: Factors, strength: float) -> Factors:
    """Factors of ``W x + strength * (W' x - W x)``, on the output axis or without a magnitude."""
    if strength == 1:
        return factors
    gain, shift = factors.gain, factors.shift
    return factors._replace(
        up=strength * factors.up,
        gain=None if gain is None else 1 + strength * (gain - 1),
        shift=None if shift is None else strength * shift,
    )


def _stacked(own: dict[str, Factors], names: Sequence[str | None]) -> Factors:
    """Each row's factors: ``down (N, r, in, *k)``, ``up (N, out, r)``, the others ``(N, n)``.

    Ranks are filled up with zeros. A row without an adapter has zeros, and a gain of 1.
    """
    first = next(iter(own.values()))
    rank = max(f.down.shape[0] for f in own.values())
    downs = {
        name: F.pad(f.down, (0, 0) * (f.down.ndim - 1) + (0, rank - f.down.shape[0]))
        for name, f in own.items()
    }
    ups = {name: F.pad(f.up.flatten(1), (0, rank - f.down.shape[0])) for name, f in own.items()}
    axis = next((f.axis for f in own.values() if f.gain is not None), first.axis)

    def stack(parts: dict[str, Tensor], empty: float = 0.0) -> Tensor | None:
        if not parts:
            return None
        one = next(iter(parts.values()))
        other = torch.full_like(one, empty, requires_grad=False)
        return torch.stack([parts.get(name or "", other) for name in names])

    down, up = stack(downs), stack(ups)
    assert down is not None
    assert up is not None
    return Factors(
        down,
        up,
        stack({name: f.gain for name, f in own.items() if f.gain is not None}, 1.0),
        stack({name: f.shift for name, f in own.items() if f.shift is not None}),
        stack({n: f.shift_numerator for n, f in own.items() if f.shift_numerator is not None}),
        axis,
    )


def _each_by_itself(layer: AdaptedLayer, x: Tensor, names: Sequence[str | None]) -> Tensor:
    """Rows of one adapter after those of another, put back in their order."""
    rows, made, places = layer._rows, [], []
    try:
        for name in dict.fromkeys(names):
            at = [place for place, other in enumerate(names) if other == name]
            vars(layer)["_rows"] = Rows((name,))
            made.append(AdaptedLayer.forward(layer, x[at]))
            places += at
    finally:
        vars(layer)["_rows"] = rows
    order = torch.tensor(places, device=x.device).argsort()
    return torch.cat(made).index_select(0, order)
