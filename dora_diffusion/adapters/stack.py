"""K adapters of the same layers, prepared together for each step of a training loop.

A run has one adapter, a pack several. They need not be attached to the layers: the rows of a batch
select them by number. Gradients accumulate in buffers, and the parameters get them at the end of
the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from dora_diffusion.adapters.buffers import Buffers
from dora_diffusion.adapters.graph import Graph
from dora_diffusion.adapters.kinds import layer_groups
from dora_diffusion.adapters.layers import AdaptedLayer, LayerAdapter, LayoutCache
from dora_diffusion.adapters.layout import Layout, Rows
from dora_diffusion.adapters.plan import NOTHING, Plan
from dora_diffusion.adapters.route import Ready, Route, routed
from dora_diffusion.numerics.dora import (
    Factors,
    direction_of,
    dora_forward,
    forward_of,
    fused_forward,
)
from dora_diffusion.numerics.precision import product_dtype

BASE: Rows = ()
"""Rows of a batch of any size without adapters."""
Entry = tuple[dict[torch.dtype, Factors], dict[torch.dtype, Ready]]
"""A layer's factors for some rows by dtype, and its `Route.ready`."""
_NOTHING: Entry = {}, {}
"""A layer's entry for the base, always empty."""


class AdapterStack:
    """K adapters of the same layers.

    Args:
        layers: The layers.
        adapters: The K adapters of each layer, in the same order.
        memory: Memory for gradients, by parameter. It is used if possible (`Buffers`). Its owner
            must raise an error if a parameter moves (`FlatParameters`).

    Raises:
        ValueError: If K is more than 1, and a layer is an Embedding or a grouped convolution, the
            adapters are not all LoRA or all DoRA on one norm axis, or one has a parametrization or
            dropout.
    """

    def __init__(
        self,
        layers: Sequence[AdaptedLayer],
        adapters: Sequence[Sequence[LayerAdapter]],
        memory: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        pairs = list(zip(layers, adapters, strict=True))
        if any(len(group) > 1 and not _fits_pack(layer, group) for layer, group in pairs):
            raise ValueError(
                "adapters can be trained together on Linear layers and convolutions without "
                "groups, all DoRA on one norm axis or all LoRA, without dropout"
            )
        self.layers, self.adapters, self._memory = layers, adapters, memory or {}
        self.rows: Rows = BASE
        self._routes = [StackRoute(self, *pair) for pair in pairs]
        self._layouts = LayoutCache()
        self._graphs: list[Graph] = []
        self._buffers: dict[Layout, Buffers] = {}
        self._made: dict[Rows, list[Entry]] = {}

    def _settled(self) -> Mapping[Any, Layout]:
        """Return the layouts. If they are new, memory of earlier steps is dropped."""
        layouts, are_new = self._layouts.of(self.layers, self.adapters)
        if are_new:
            self._buffers = {}
            for route in self._routes:
                route.settle()
            for layout in layouts.values() if self._memory else ():
                layout.read_in_place()
            self._dtype = next((r.plain_dtype for r in self._routes if r.plain_dtype), None)
            self._parameters = [p for group in self.adapters for a in group for p in a.parameters()]
        return layouts

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Compute with the adapters' current values inside the block; rows are initially the base.

        The parameters get their gradients at the end of the block.

        Raises:
            RuntimeError: At the end, if a parameter changed inside the block.
        """
        self._graphs = [
            Graph(Plan(layout, self._layouts.flags[kind]), has_edges=False)
            for kind, layout in self._settled().items()
        ]
        self._made = {}
        before = [parameter._version for parameter in self._parameters]
        try:
            with routed(self.layers, self._routes):
                self._choose(BASE)
                yield
                if before != [parameter._version for parameter in self._parameters]:
                    raise RuntimeError("an adapter's parameters changed inside of its step")
                for graph in self._graphs:
                    buffers = self._buffers.get(graph.plan.layout)
                    collected = NOTHING if buffers is None else buffers.collect()
                    graph.plan.give_gradients(graph.collect(collected))
        except BaseException:
            self._buffers = {}  # They may have gradients of the step.
            raise
        finally:
            self._graphs = []

    @contextmanager
    def of(self, rows: int | Sequence[int]) -> Iterator[None]:
        """Use these adapters for the rows of a batch inside the block, backward passes included.

        Args:
            rows: The adapter of each row; a number if all rows of any batch use it; `BASE` for
                none.
        """
        before = self.rows
        if not isinstance(rows, int):
            rows = rows[0] if len(set(rows)) == 1 else tuple(rows)
        try:
            is_new = rows not in self._made
            self._choose(rows)
            # Before the first layer is called, so that every layer has its ``ready`` forward.
            if isinstance(rows, int) and self._dtype is not None and is_new:
                self._make_ready(self._dtype)
            yield
            for buffers in self._buffers.values():
                buffers.end_pass()
        finally:
            self._choose(before)

    def _choose(self, rows: Rows) -> None:
        self.rows = rows
        if rows not in self._made:
            self._made[rows] = [_NOTHING if rows == BASE else ({}, {}) for _ in self.layers]
        for route, entry in zip(self._routes, self._made[rows], strict=True):
            route.factors_by_dtype, route.ready = entry

    def _make_ready(self, dtype: torch.dtype) -> None:
        """Compute the factors of all layers in a dtype, for rows that use one adapter."""
        for graph in self._graphs:
            plan, layout = graph.plan, graph.plan.layout
            is_one_dora = layout.count == 1 and layout.has_gain and layout.axis == "output"
            if not is_one_dora or not self._layouts.is_kept:
                self._make(graph, dtype)
                continue
            if layout not in self._buffers:
                routes = enumerate(self._routes[number] for number in layout.numbers)
                fusible = {
                    index: route.op
                    for index, route in routes
                    if route.plain_dtype == dtype
                    and forward_of(route.op, layout.axis) is fused_forward
                }
                self._buffers[layout] = Buffers(layout, dtype, fusible, self._memory)
            self._buffers[layout].fill(plan)
            for index, forward in self._buffers[layout].forwards.items():
                if index not in plan.direct:
                    self._made[self.rows][layout.numbers[index]][1][dtype] = forward

    def make(self, dtype: torch.dtype) -> None:
        """Compute the factors of all layers in a dtype, for the current rows."""
        for graph in self._graphs:
            self._make(graph, dtype)

    def _make(self, graph: Graph, dtype: torch.dtype) -> None:
        pairs = zip(graph.plan.layout.numbers, graph.factors(dtype, self.rows), strict=True)
        for number, factors in pairs:
            route, (factors_by_dtype, ready) = self._routes[number], self._made[self.rows][number]
            factors_by_dtype[dtype] = factors
            if isinstance(self.rows, int) and route.plain_dtype == dtype:
                op, bias = route.op, route.layer.bias
                forward = partial(dora_forward, op, weight=route.matrix, bias=bias, factors=factors)
                ready.setdefault(dtype, forward)


def _fits_pack(layer: AdaptedLayer, group: Sequence[LayerAdapter]) -> bool:
    """Return whether a layer and its adapters can be part of a pack."""
    return (
        layer.kind != "embedding"
        and layer_groups(layer) == 1
        and len({(a.magnitude is None, a.norm_axis) for a in group}) == 1
        and not any(a.parametrization or a.dropout for a in group)
    )


class StackRoute(Route):
    """Route of a layer in a stack.

    Args:
        stack: The stack.
        layer: The layer.
        adapters: The K adapters of the layer.

    Attributes:
        factors_by_dtype: Factors for the current rows in the dtypes computed so far.
        op: Operation of the weight.
        matrix: The weight ``(out, in, *k)``.
        plain_dtype: Dtype of inputs that need no preparation; None: all inputs need it.
    """

    def __init__(
        self, stack: AdapterStack, layer: AdaptedLayer, adapters: Sequence[LayerAdapter]
    ) -> None:
        self.stack, self.layer, self.adapters = stack, layer, adapters
        self.factors_by_dtype: dict[torch.dtype, Factors] = {}

    def settle(self) -> None:
        """Read the properties of the layer that are the same in all steps."""
        layer, bias = self.layer, self.layer.bias
        self.op, self.matrix = layer.operation(), layer.dense()
        is_plain = (
            layer.shard is None
            and layer.is_prepared
            and (bias is None or bias.dtype == layer.weight.dtype)
            and not any(adapter.dropout for adapter in self.adapters)
        )
        self.plain_dtype = layer.weight.dtype if is_plain else None
        # A single attached adapter is listed by name, for compiled blocks.
        known = layer.adapters.items() if len(self.adapters) == 1 else ()
        self.norms = {name: self for name, adapter in known if adapter is self.adapters[0]}

    @property
    def is_mixed(self) -> bool:
        return len(self.adapters) > 1 or self.stack.rows == BASE

    def scales(self, name: str, adapter: LayerAdapter) -> StackRoute:
        return self

    def prepare(self) -> None:
        if self.norms:
            self.factors(product_dtype(self.layer.weight))

    def factors(self, dtype: torch.dtype) -> Factors:
        """Return the factors in a dtype. The first call computes them for all layers."""
        if dtype not in self.factors_by_dtype:
            self.stack.make(dtype)
        return self.factors_by_dtype[dtype]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, each row with its own adapter.

        Raises:
            ValueError: If the batch's size differs from the number of rows.
        """
        rows, layer = self.stack.rows, self.layer
        if rows == BASE:
            return layer.adapted(x, ())
        if isinstance(rows, int):
            return layer.adapted(x, [("", self.adapters[rows])])
        if len(rows) != len(x):
            raise ValueError(
                f"a layer is called with a batch of {len(x)}, but adapters are given for "
                f"{len(rows)} rows"
            )
        op, (inputs, matrix, bias) = layer.operation(), layer.operands(x)
        assert isinstance(inputs, Tensor)
        factors = self.factors(inputs.dtype)
        if not factors.gain_in_graph:
            return dora_forward(op, inputs, matrix, bias, factors)
        return torch.cat([
            dora_forward(op, inputs[row, None], matrix, bias, self._factors_of_row(factors, k, row))
            for row, k in enumerate(rows)
        ])  # fmt: skip

    def _factors_of_row(self, factors: Factors, k: int, row: int) -> Factors:
        """Return the factors of one row, with its direction."""
        down, up, shift = factors.down[row], factors.up[row], factors.shift
        return factors._replace(
            down=down,
            up=up.view(*up.shape, *[1] * (down.ndim - 2)),
            gain=cast(Tensor, factors.gain)[row],
            shift=None if shift is None else shift[row],
            direction=direction_of(
                self.layer.dense(), self.adapters[k].scaled_weights(), down.dtype
            ),
        )
