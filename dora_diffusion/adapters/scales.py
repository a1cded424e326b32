"""Norms and factors of layers with one adapter each, outside of training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_diffusion.adapters.flags import DeferredFlags
from dora_diffusion.adapters.graph import Graph
from dora_diffusion.adapters.layout import Layout, layouts_of
from dora_diffusion.adapters.plan import Plan
from dora_diffusion.adapters.site import Site
from dora_diffusion.numerics.dora import Factors, factors_of


def make_scales(sites: Sequence[Site]) -> list[LayerScales]:
    """Compute the norms and gains of many layers, each with one adapter."""
    return scales_of(layouts_of(sites))


def scales_of(
    layouts: Mapping[Any, Layout], flags: Mapping[Any, DeferredFlags] | None = None
) -> list[LayerScales]:
    """Compute the scales for existing layouts, from the current values of the parameters.

    Args:
        layouts: Result of `layouts_of`.
        flags: Flags of each layout, read one step late to avoid a synchronization. None reads them
            at once.
    """
    scales: dict[int, LayerScales] = {}
    for kind, layout in layouts.items():
        graph = Graph(Plan(layout, None if flags is None else flags[kind]))
        # Not stored in the graph: the factors refer to it, and cycles are freed late.
        factors: list[dict[torch.dtype, Factors]] = [{} for _ in layout.sites]
        for index, number in enumerate(layout.numbers):
            scales[number] = LayerScales(graph, index, factors[index], factors)
    return [scales[number] for number in range(len(scales))]


class LayerScales(NamedTuple):
    """One layer's part of a plan.

    Attributes:
        graph: Factors of all layers of the plan.
        number: Index of the layer in the plan.
        factors_by_dtype: The layer's factors in the dtypes computed so far.
        factors_of_all: ``factors_by_dtype`` of each layer of the plan.
    """

    graph: Graph
    number: int
    factors_by_dtype: dict[torch.dtype, Factors]
    factors_of_all: Sequence[dict[torch.dtype, Factors]]

    @property
    def norm(self) -> Tensor | None:
        """``norm(W + sBA)``, ``(n,)``, float32; None for LoRA."""
        plan = self.graph.plan
        return None if plan.norm is None else torch.split(plan.norm, plan.layout.sizes)[self.number]

    def factors(self, dtype: torch.dtype) -> Factors:
        """Return the layer's factors. The first call computes them for all layers of the plan."""
        if dtype not in self.factors_by_dtype:
            of_all = zip(self.factors_of_all, self.graph.factors(dtype), strict=True)
            for factors_by_dtype, factors in of_all:
                factors_by_dtype[dtype] = factors
        is_in_backward = torch._C._current_graph_task_id() != -1  # In this thread.
        if not torch.is_grad_enabled():
            self.graph.ran_without_gradients.add(self.number)
        elif self.number in self.graph.ran_without_gradients and is_in_backward:
            # Reentrant checkpointing runs a backward pass per block. Through the plan each pass
            # would reach the parameters of all blocks, and DistributedDataParallel would reduce
            # incomplete gradients.
            site = self.graph.plan.layout.sites[self.number]
            return factors_of(site.weight, site.bias, site.adapters[0], dtype, norm=self.norm)
        return self.factors_by_dtype[dtype]


class FixedScales:
    """Factors of an adapter that is not trained, by dtype.

    Args:
        site: The layer with the adapter.
        scales: The layer's part of a plan. It is freed when the factors are computed.
    """

    def __init__(self, site: Site, scales: LayerScales) -> None:
        self._site = site
        self._scales: LayerScales | None = scales
        self.factors_by_dtype: dict[torch.dtype, Factors] = {}

    def factors(self, dtype: torch.dtype) -> Factors:
        """Return the factors, without tensors that only gradients need."""
        if dtype not in self.factors_by_dtype:
            scales = self._scales or make_scales([self._site])[0]
            factors, self._scales = scales.factors(dtype), None
            down, up, gain = factors.down.detach(), factors.up.detach(), factors.gain
            gain = None if gain is None else gain.detach()
            # On the output axis only the gradient of m needs a direct layer.
            gain_in_graph = factors.gain_in_graph and factors.axis == "input"
            detached = Factors(down, up, gain, factors.shift, None, factors.axis, gain_in_graph)
            self.factors_by_dtype[dtype] = detached
        return self.factors_by_dtype[dtype]
