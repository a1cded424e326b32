"""K adapters of the same layers, made ready together for each step of a loop that trains them.

A run has one, a pack several, which need not be on the layers: the rows of a batch choose among
them by number. Gradients are left in buffers, and become the parameters' at the end of the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from dora_diffusion.adapters.kinds import layer_groups
from dora_diffusion.adapters.layers import AdaptedLayer, LayerAdapter, LayoutCache
from dora_diffusion.adapters.layout import Rows, layouts_of
from dora_diffusion.adapters.plan import Plan
from dora_diffusion.adapters.route import Ready, Route, forward_rows, routed
from dora_diffusion.numerics.dora import (
    Factors,
    direction_of,
    dora_forward,
    gain,
    sum_of_adapters,
)
from dora_diffusion.numerics.operation import MaskedOperation, Operation, dropout
from dora_diffusion.numerics.precision import product_dtype
from dora_diffusion.numerics.weights import LayerWeights

BASE: Rows = ()
"""Rows of a batch that have no adapter, however many they are."""
Masks = Sequence[Tensor | None]
"""For each layer a factor of each rank of each row, ``(N, r)`` or ``(1, r)``; None: all are 1."""


class AdapterStack:
    """K adapters of the same layers.

    Args:
        layers: The layers.
        adapters: The K adapters of each layer, in the same order.

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
        self.masks: Masks = ()
        self.norm_changes: Masks = ()
        each = zip(layers, adapters, strict=True)
        self._routes = [StackRoute(self, *parts) for parts in each]
        self._layouts = LayoutCache()
        self._dtype: torch.dtype | None = None
        self._plans: list[Plan] = []
        # Each layer's factors by dtype, and its `Route.ready`.
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
            for route in self._routes:
                route.settle()
            self._dtype = next((r.plain_dtype for r in self._routes if r.plain_dtype), None)
            self._parameters = [p for own in self.adapters for a in own for p in a.parameters()]
        flags = self._layouts.flags
        self._plans = [Plan(own, flags[kind], has_edges=False) for kind, own in layouts.items()]
        self._made, before = {}, [parameter._version for parameter in self._parameters]
        try:
            with routed(self.layers, self._routes):
                self._choose(BASE)
                yield
                if before != [parameter._version for parameter in self._parameters]:
                    raise RuntimeError("an adapter's parameters changed inside of its step")
                for plan in self._plans:
                    plan.give_gradients()
        finally:
            self._plans = []

    @contextmanager
    def of(
        self, rows: int | Sequence[int], masks: Masks = (), active: Masks = ()
    ) -> Iterator[None]:
        """Use these adapters for the rows of a batch inside the block, backward passes included.

        A masked row of a DoRA computes ``g (W + s B M A)``, with the norm of the whole update
        ``W + s B A`` in its gain, as it is without a mask: what dropout takes away is made up for
        in the mean. Where ranks are left out for good, as T-LoRA does by timestep, its norm is
        that of the applied weight, ``W + s B M' A`` with ``active`` as M', so that each row is the
        DoRA of its own ranks. All norms are constants for the gradient.

        Args:
            rows: The adapter of each row; a number where all have it, however many they are; `BASE`
                for none.
            masks: Factor of each rank of the rows (`MaskedOperation`).
            active: Factors of the ranks in the norm, with a row for each row of the batch.
        """
        before = self.rows, self.masks, self.norm_changes
        changes = self._norm_changes(rows, active) if active else ()
        if not isinstance(rows, int):
            rows = rows[0] if len(set(rows)) == 1 else tuple(rows)
        try:
            self._choose(rows, masks, changes)
            # Before a layer asks, which could then not have all of it ready.
            if isinstance(rows, int) and self._dtype is not None and not any(self._made[rows][0]):
                self.make(self._dtype)
            yield
        finally:
            self._choose(*before)

    def _choose(self, rows: Rows, masks: Masks = (), norm_changes: Masks = ()) -> None:
        for route in self._routes if self.masks else ():
            route.mask = route.norm_change = None
        self.rows, self.masks, self.norm_changes = rows, masks, norm_changes
        if rows not in self._made:
            self._made[rows] = [({}, {}) for _ in self.layers]
        for route, made in zip(self._routes, self._made[rows], strict=True):
            route.factors_by_dtype, route.ready = made
        for route, mask in zip(self._routes, masks, strict=False):
            if mask is not None:
                route.mask, route.ready = mask, {}
        for route, change in zip(self._routes, norm_changes, strict=False):
            route.norm_change = change

    @torch.no_grad()
    def _norm_changes(self, rows: int | Sequence[int], active: Masks) -> Masks:
        """`Factors.norm_change` of each layer, from norms as of an adapter for each row."""
        if all(masks is None for masks in active):
            return ()
        whole: dict[int, Sequence[Tensor]] = {}
        for plan in self._plans:
            if plan.norm is not None:
                norms, count = torch.split(plan.norm, plan.layout.sizes), plan.layout.count
                for place, number in enumerate(plan.layout.numbers):
                    whole[number] = norms[place * count : (place + 1) * count]
        numbers, sites, owners = [], [], list[int]()
        for number, masks in enumerate(active):
            if masks is not None and number in whole:
                site = self.layers[number].site(self.adapters[number])
                owners = [rows] * len(masks) if isinstance(rows, int) else list(rows)
                each = zip(owners, masks, strict=True)
                adapters = [_masked(site.adapters[k], mask) for k, mask in each]
                numbers.append(number)
                sites.append(site._replace(adapters=adapters))
        made: list[Tensor | None] = [None] * len(self.layers)
        for layout in layouts_of(sites).values():
            own = [numbers[place] for place in layout.numbers]
            norm = Plan(layout).norm
            assert norm is not None
            change = gain(torch.cat([whole[n][k] for n in own for k in owners]), norm).sub_(1)
            parts = torch.split(change, [len(owners) * width for width in layout.widths])
            for number, part in zip(own, parts, strict=True):
                made[number] = part.view(len(owners), -1)
        return made

    def make(self, dtype: torch.dtype) -> None:
        """Make the factors of all layers in a dtype, for the rows of now."""
        made, has_one = self._made[self.rows], isinstance(self.rows, int)
        for plan in self._plans:
            factors = plan.factors(dtype, self.rows)
            for number, own in zip(plan.layout.numbers, factors, strict=True):
                route, (factors_by_dtype, ready) = self._routes[number], made[number]
                factors_by_dtype[dtype] = own
                if has_one and route.plain_dtype == dtype:
                    op, matrix, bias = route.op, route.matrix, route.layer.bias
                    ready[dtype] = partial(dora_forward, op, weight=matrix, bias=bias, factors=own)


def _masked(weights: LayerWeights, mask: Tensor) -> LayerWeights:
    """Weights with a row's mask ``(r,)`` in A; PiSSA's, of twice the rank, repeat it."""
    mask = mask.repeat(max(1, weights.rank // len(mask)))[: weights.rank]
    return dataclasses.replace(weights, down=weights.down * _along_rank(mask, weights.down))


def _along_rank(mask: Tensor, down: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (down.ndim - 1))


class StackRoute(Route):
    """Route of a layer in a stack.

    Args:
        stack: The stack.
        layer: The layer.
        adapters: The K adapters of the layer.

    Attributes:
        factors_by_dtype: Factors for the current rows, as far as they were made.
        mask: Factor of each rank of the current rows; None: all are 1.
        norm_change: `Factors.norm_change` of the current rows.
        op: Operation of the weight.
        matrix: The weight ``(out, in, *k)``.
        plain_dtype: The dtype in which input and weight are used as they are; None: in no dtype.
    """

    def __init__(
        self, stack: AdapterStack, layer: AdaptedLayer, adapters: Sequence[LayerAdapter]
    ) -> None:
        self.stack, self.layer, self.adapters = stack, layer, adapters
        self.factors_by_dtype: dict[torch.dtype, Factors] = {}
        self.mask: Tensor | None = None
        self.norm_change: Tensor | None = None

    def settle(self) -> None:
        """Read the properties of the layer that no step changes."""
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
        # By the name of a single adapter that is on the layer, as compiled blocks look for it.
        known = layer.adapters.items() if len(self.adapters) == 1 else ()
        self.norms = {name: self for name, own in known if own is self.adapters[0]}

    @property
    def is_mixed(self) -> bool:
        return len(self.adapters) > 1 or self.stack.rows == BASE

    def scales(self, name: str, adapter: LayerAdapter) -> StackRoute:
        return self

    def prepare(self) -> None:
        if self.norms:
            self.factors(product_dtype(self.layer.weight))

    def factors(self, dtype: torch.dtype) -> Factors:
        """Return the factors in a dtype; made for all layers at the first call."""
        if dtype not in self.factors_by_dtype:
            self.stack.make(dtype)
        return self.factors_by_dtype[dtype]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, each row with its own adapter.

        Raises:
            ValueError: If the batch has another number of rows.
        """
        rows, layer, mask = self.stack.rows, self.layer, self.mask
        if rows == BASE:
            return layer.adapted(x, ())
        if mask is None and isinstance(rows, int):
            return layer.adapted(x, [("", self.adapters[rows])])
        each = (rows,) * len(cast(Tensor, mask)) if isinstance(rows, int) else rows
        if len(each) not in (len(x), 1):
            raise ValueError(f"a layer is called with a batch of {len(x)} and not {len(each)} rows")
        op, (inputs, matrix, bias) = layer.operation(), layer.operands(x)
        factors = self.factors(inputs.dtype)._replace(norm_change=self.norm_change)
        if isinstance(rows, int):
            factors = layer.with_direction(factors, self.adapters[rows])
            if factors.direction is None:
                op = MaskedOperation(op, cast(Tensor, mask))
                return self._forward_one(rows, op, inputs, matrix, bias, factors)
        elif not factors.gain_in_graph:
            return forward_rows(op, cast(Tensor, inputs), matrix, bias, factors, mask)
        made = []
        for row, k in enumerate(each):
            one: Any = inputs if len(each) == 1 else inputs[row, None]  # type: ignore[index]
            own = self._factors_of_row(factors, k, row)
            made.append(self._forward_one(k, op, one, matrix, bias, own))
        return torch.cat(made)

    def _forward_one(
        self, k: int, op: Operation, x: Any, matrix: Tensor, bias: Tensor | None, factors: Factors
    ) -> Tensor:
        """Return the output of rows with one adapter, which may drop inputs."""
        p = self.adapters[k].dropout
        if not (self.layer.training and p):
            return dora_forward(op, x, matrix, bias, factors)
        dropped = dropout(x, p, training=True)
        return sum_of_adapters(op, x, matrix, bias, [(factors, 1.0, dropped)])

    def _factors_of_row(self, factors: Factors, k: int, row: int) -> Factors:
        """Return the factors of one row, with its mask in A and in the direction."""
        if isinstance(self.stack.rows, tuple):
            up, ones = factors.up[row], [1] * (factors.down.ndim - 3)
            factors = factors._replace(
                down=factors.down[row],
                up=up.view(*up.shape, *ones),
                gain=cast(Tensor, factors.gain)[row],
                shift=None if factors.shift is None else factors.shift[row],
                shift_numerator=None,
            )
        down, change = factors.down, factors.norm_change
        mask = down.new_ones(len(down)) if self.mask is None else self.mask[row]
        weights = _masked(self.adapters[k].scaled_weights(), mask)
        mask = _along_rank(mask.repeat(len(down) // len(mask)), down).to(down.dtype)
        return factors._replace(
            down=down * mask,
            direction=direction_of(self.layer.dense(), weights, down.dtype),
            norm_change=None if change is None else change[row, None],
        )
