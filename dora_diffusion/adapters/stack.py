"""K adapters of the same layers, made ready together for each step of a loop that trains them.

A run has one, a pack several, which need not be on the layers: the rows of a batch choose among
them by number. Gradients are left in buffers, and become the parameters' at the end of the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from dora_diffusion.adapters.kinds import layer_groups
from dora_diffusion.adapters.layers import AdaptedLayer, LayerAdapter, LayoutCache, Ready
from dora_diffusion.adapters.layout import Rows
from dora_diffusion.adapters.plan import Plan
from dora_diffusion.numerics.dora import Factors, direction_of, dora_forward, sum_of_adapters
from dora_diffusion.numerics.operation import MaskedOperation, Operation, RowOperation, dropout

BASE: Rows = ()
"""Rows of a batch that have no adapter, however many they are."""


class AdapterStack:
    """K adapters of the same layers.

    Args:
        layers: The layers.
        adapters: Of each layer the K adapters, in the same order.

    Raises:
        ValueError: If K is more than 1, and a layer is an Embedding or a grouped convolution, or
            adapters have other magnitudes than each other, another parametrization than A and B, or
            dropout.
    """

    def __init__(
        self, layers: Sequence[AdaptedLayer], adapters: Sequence[Sequence[LayerAdapter]]
    ) -> None:
        for layer, own in zip(layers, adapters, strict=True):
            is_plain = layer.kind != "embedding" and layer_groups(layer) == 1
            alike = {(a.magnitude is None, a.norm_axis) for a in own}
            if len(own) > 1 and not (
                is_plain
                and len(alike) == 1
                and not any(a.parametrization or a.dropout for a in own)
            ):
                raise ValueError(
                    "adapters can be trained together on Linear layers and convolutions without "
                    "groups, all DoRA on one norm axis or all LoRA, without dropout"
                )
        self.layers, self.adapters = layers, adapters
        self.rows: Rows = BASE
        self.masks: Sequence[Tensor] = ()
        each = zip(layers, adapters, strict=True)
        self._places = [StackPlace(self, *parts) for parts in each]
        self._layouts = LayoutCache()
        self._dtype: torch.dtype | None = None
        self._plans: list[Plan] = []
        # Of each layer its factors by dtype, and what it is ready with where its input stays.
        self._made: dict[Rows, list[tuple[dict[torch.dtype, Factors], dict[torch.dtype, Ready]]]]

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Use the adapters as they are now inside the block; rows have none until they are set.

        In the end the parameters get their gradients.

        Raises:
            RuntimeError: In the end, if one has changed inside.
        """
        layouts, are_new = self._layouts.of(self.layers, self.adapters)
        if are_new:
            for place in self._places:
                place.settle()
            self._dtype = next((p.plain_dtype for p in self._places if p.plain_dtype), None)
            self._parameters = [p for own in self.adapters for a in own for p in a.parameters()]
        flags = self._layouts.flags
        self._plans = [Plan(own, flags[kind], has_edges=False) for kind, own in layouts.items()]
        self._made, before = {}, [parameter._version for parameter in self._parameters]
        for layer, place in zip(self.layers, self._places, strict=True):
            # Past `nn.Module.__setattr__`, which takes longer than all else here.
            vars(layer).update(_place=place, _scales_cache=dict(place.by_name))
        self._choose(BASE)
        try:
            yield
            if before != [parameter._version for parameter in self._parameters]:
                raise RuntimeError("an adapter's parameters changed inside of its step")
            for plan in self._plans:
                plan.give_gradients()
        finally:
            for layer in self.layers:
                vars(layer).update(_place=None, _ready={}, _scales_cache=None)
            self._plans = []

    @contextmanager
    def of(self, rows: int | Sequence[int], masks: Sequence[Tensor] = ()) -> Iterator[None]:
        """Use these adapters for the rows of a batch inside the block, backward passes included.

        Args:
            rows: The adapter of each row; a number where all have it, however many they are; `BASE`
                for none.
            masks: Of each layer ``(N, r)`` or ``(1, r)``, by which each rank of the rows is
                multiplied (`MaskedOperation`); none: they are as they are.
        """
        before = self.rows, self.masks
        if not isinstance(rows, int):
            rows = rows[0] if len(set(rows)) == 1 else tuple(rows)
        try:
            self._choose(rows, masks)
            # Before a layer asks, which could then not have all of it ready.
            if isinstance(rows, int) and self._dtype is not None and not any(self._made[rows][0]):
                self.make(self._dtype)
            yield
        finally:
            self._choose(*before)

    def _choose(self, rows: Rows, masks: Sequence[Tensor] = ()) -> None:
        for place in self._places if self.masks else ():
            place.mask = None
        self.rows, self.masks = rows, masks
        if rows not in self._made:
            self._made[rows] = [({}, {}) for _ in self.layers]
        for layer, place, made in zip(self.layers, self._places, self._made[rows], strict=True):
            place.factors_by_dtype, vars(layer)["_ready"] = made
        for number, mask in enumerate(masks):  # No layer computes past its place.
            self._places[number].mask, vars(self.layers[number])["_ready"] = mask, {}

    def make(self, dtype: torch.dtype) -> None:
        """Make the factors of all layers in a dtype, for the rows of now."""
        made, has_one = self._made[self.rows], isinstance(self.rows, int)
        for plan in self._plans:
            factors = plan.factors(dtype, self.rows)
            for number, own in zip(plan.layout.numbers, factors, strict=True):
                place, (factors_by_dtype, ready) = self._places[number], made[number]
                factors_by_dtype[dtype] = own
                if has_one and place.plain_dtype == dtype:
                    ready[dtype] = place.op, place.matrix, place.layer.bias, own


class StackPlace:
    """A layer in a stack.

    Args:
        stack: The stack.
        layer: The layer.
        adapters: Its adapters.

    Attributes:
        factors_by_dtype: Its factors for the rows of now, as far as they were made.
        mask: By what each rank of the rows of now is multiplied; None: as they are.
        by_name: Itself by the name of a single adapter that is on the layer, which is what compiled
            blocks know.
        op: What the weight does to an input.
        matrix: The weight ``(out, in, *k)``.
        plain_dtype: The only dtype in which nothing is to be done to an input, or to the weight;
            None: something always is.
    """

    def __init__(
        self, stack: AdapterStack, layer: AdaptedLayer, adapters: Sequence[LayerAdapter]
    ) -> None:
        self.stack, self.layer, self.adapters = stack, layer, adapters
        self.factors_by_dtype: dict[torch.dtype, Factors] = {}
        self.mask: Tensor | None = None

    def settle(self) -> None:
        """Find out what no step changes."""
        layer, bias = self.layer, self.layer.bias
        is_low = layer.weight.dtype == torch.bfloat16 and layer.weight.device.type == "cpu"
        self.op, self.matrix = layer.operation(leaves_garbage=is_low), layer.dense()
        is_plain = (
            layer.shard is None
            and layer.is_prepared
            and (bias is None or bias.dtype == layer.weight.dtype)
            and not any(own.dropout for own in self.adapters)
        )
        self.plain_dtype = layer.weight.dtype if is_plain else None
        known = layer.adapters.items() if len(self.adapters) == 1 else ()
        self.by_name = {name: self for name, own in known if own is self.adapters[0]}

    @property
    def is_mixed(self) -> bool:
        """True if the rows of a batch use several adapters, or none."""
        return len(self.adapters) > 1 or self.stack.rows == BASE

    def factors(self, dtype: torch.dtype) -> Factors:
        """Return the factors in a dtype; made for all layers at the first call."""
        if dtype not in self.factors_by_dtype:
            self.stack.make(dtype)
        return self.factors_by_dtype[dtype]

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer, whatever is to be done to its input.

        Raises:
            ValueError: If the batch has another number of rows.
        """
        rows, layer = self.stack.rows, self.layer
        if rows == BASE:
            return cast(Tensor, super(AdaptedLayer, layer).forward(x))
        inputs, matrix, bias = layer.operands(x)
        op, factors, mask = layer.operation(), self.factors(inputs.dtype), self.mask
        expected = len(rows) if not isinstance(rows, int) else 1 if mask is None else len(mask)
        if expected not in (len(x), 1):
            raise ValueError(f"a layer is called with a batch of {len(x)} and not {expected} rows")
        if isinstance(rows, int):
            factors = layer.with_direction(factors, self.adapters[rows])
            if mask is None or factors.direction is None:
                op = op if mask is None else MaskedOperation(op, mask)
                return self._alone(op, inputs, matrix, bias, factors)
            masked = [self._masked(factors, rows, own) for own in mask]
            if len(masked) == 1:
                return self._alone(op, inputs, matrix, bias, masked[0])
            each = ((inputs[row, None], own) for row, own in enumerate(masked))  # type: ignore[index]
            return torch.cat([self._alone(op, x, matrix, bias, own) for x, own in each])
        assert isinstance(inputs, Tensor)
        if factors.is_direct:
            return self._direct_rows(rows, op, inputs, matrix, bias, factors)
        op = RowOperation(op, inputs.ndim, len(rows))
        op = op if mask is None else MaskedOperation(op, mask)
        return dora_forward(op, inputs, matrix, bias, factors)

    def _alone(
        self, op: Operation, x: Any, matrix: Tensor, bias: Tensor | None, factors: Factors
    ) -> Tensor:
        """Rows that all have the adapter of the rows of now, which may drop inputs."""
        p = self.adapters[cast(int, self.stack.rows)].dropout
        if not (self.layer.training and p):
            return dora_forward(op, x, matrix, bias, factors)
        dropped = dropout(x, p, training=True)
        return sum_of_adapters(op, x, matrix, bias, [(factors, 1.0, dropped)])

    def _masked(self, factors: Factors, k: int, mask: Tensor) -> Factors:
        """Factors of an adapter with a row's mask ``(r,)`` in A, and in the direction."""
        weights, down = self.adapters[k].scaled_weights(), factors.down
        mask = mask.repeat(len(down) // len(mask)).view(-1, *[1] * (down.ndim - 1))
        weights = dataclasses.replace(weights, down=weights.down * mask[: weights.rank])
        made = direction_of(self.layer.dense(), weights, down.dtype)
        return factors._replace(down=down * mask.to(down.dtype), direction=made)

    def _direct_rows(
        self, rows: tuple[int, ...], op: Operation, x: Tensor, matrix: Tensor, bias: Tensor | None,
        factors: Factors,
    ) -> Tensor:  # fmt: skip
        """Rows of one adapter after those of another, with the gain in the graph."""
        made = []
        assert factors.gain is not None
        for row, k in enumerate(rows):
            up = factors.up[row]
            own = factors._replace(
                down=factors.down[row],
                up=up.view(*up.shape, *[1] * (factors.down.ndim - 3)),
                gain=factors.gain[row],
                shift=None if factors.shift is None else factors.shift[row],
                shift_numerator=None,
            )
            mask = own.down.new_ones(len(own.down)) if self.mask is None else self.mask[row]
            made.append(dora_forward(op, x[row, None], matrix, bias, self._masked(own, k, mask)))
        return torch.cat(made)
