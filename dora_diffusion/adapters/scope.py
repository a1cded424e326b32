"""Norm scopes: norms computed once for several calls, with one adapter for all rows or per row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from dora_diffusion.adapters.inject import require_adapters
from dora_diffusion.adapters.layers import (
    AdaptedLayer,
    LayerAdapter,
    LayoutCache,
    adapted_layers,
    state_of,
)
from dora_diffusion.adapters.norm_routes import NormRoute, RowRoute
from dora_diffusion.adapters.route import routed
from dora_diffusion.adapters.scales import FixedScales, LayerScales, make_scales, scales_of

Entry = tuple[NormRoute, str, LayerAdapter]
"""The route of a layer, and an adapter of that layer by name."""


class NormCache:
    """Cache that a loop of training steps keeps from one `norm_scope` to the next.

    Create one before the loop and pass it to the scope of each step. A step then needs no
    synchronization with the device, and reuses the layouts of earlier steps. Between steps,
    adapters may be added, removed, switched on or off, merged and moved. Do not write a base weight
    through ``.data``: CUDA detects the change one step late.

    Example:
        >>> import torch
        >>> from dora_diffusion import AdapterConfig, inject_adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> report = inject_adapters(model, AdapterConfig(targets=("*",), rank=2))
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        >>> cache = NormCache()
        >>> for _ in range(2):
        ...     with norm_scope(model, cache=cache):
        ...         model(torch.ones(1, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(self) -> None:
        self._models: tuple[nn.Module, ...] = ()
        self._layers: list[AdaptedLayer] = []
        self._changes = -1
        self._layouts = LayoutCache()

    def layers(self, models: tuple[nn.Module, ...]) -> list[AdaptedLayer]:
        """Return the adapted layers of the models, cached until a layer is adapted or restored."""
        # Modules are compared by identity.
        if self._models != models or self._changes != AdaptedLayer.changes:
            self._models, self._changes = models, AdaptedLayer.changes
            self._layers = [layer for model in models for _, layer in adapted_layers(model)]
        return self._layers

    def scales(self, entries: Sequence[Entry]) -> Sequence[LayerScales | FixedScales | None]:
        """Return the scales of each adapter; None if the cache holds none for it."""
        return scales_of(self._layouts.of(*_columns(entries))[0], self._layouts.flags)


_LAYOUTS: WeakKeyDictionary[nn.Module, LayoutCache] = WeakKeyDictionary()
"""Layouts of scopes without a cache, by their first model."""


class FixedNorms(NormCache):
    """Cache of the norms of adapters that are not trained, from one `norm_scope` to the next.

    Norms are computed when an adapter is first used, and again after a change of its parameters,
    its strengths or the base weight. Use it for sampling only: the factors have no gradients. They
    are freed with the adapter.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fixed: WeakKeyDictionary[LayerAdapter, tuple[object, FixedScales]]
        self._fixed = WeakKeyDictionary()

    def scales(self, entries: Sequence[Entry]) -> Sequence[LayerScales | FixedScales | None]:
        """Return the scales of each adapter; None for LoRA."""
        nothing: tuple[object, None] = None, None
        missing: dict[str, list[tuple[AdaptedLayer, LayerAdapter, object]]] = {}
        for route, name, adapter in entries:
            layer = route.layer
            state: object = (adapter.versions(), state_of([layer], [[adapter]]))
            if adapter.magnitude is not None and self._fixed.get(adapter, nothing)[0] != state:
                missing.setdefault(name, []).append((layer, adapter, state))
        # A plan for each adapter, so that its tensors are freed with the adapter.
        for group in missing.values():
            sites = [layer.site([adapter]) for layer, adapter, _ in group]
            for (_, adapter, state), site, layer_scales in zip(
                group, sites, make_scales(sites), strict=True
            ):
                self._fixed[adapter] = state, FixedScales(site, layer_scales)
        return [self._fixed.get(adapter, nothing)[1] for _, _, adapter in entries]


@contextmanager
def norm_scope(*models: nn.Module, cache: NormCache | None = None) -> Iterator[None]:
    """Compute each adapter's norm once inside the block, in which no parameter may change.

    Open one around the forward and backward passes of one optimizer step, as the training loop
    does, and one around all steps of a sampling run. Norms are dropped at the end of the block. A
    layer raises an error if one of its parameters was written or replaced inside the block. Writes
    of torch's optimizers and their subclasses are always detected; writes of other code through
    ``.data`` are not.

    Without a scope the results are the same, but every call of an adapted layer computes its norm
    from the whole weight, and again when gradient checkpointing recomputes the layer. On a GPU
    every call also synchronizes with the device: 609 times for a forward pass of SDXL. A scope
    synchronizes once.

    Args:
        models: The models with adapters.
        cache: Cache for a whole loop of training steps. With it no scope synchronizes.

    Raises:
        RuntimeError: In a layer's forward, if its adapter changed inside the block.

    Example:
        >>> import torch
        >>> from dora_diffusion import AdapterConfig, inject_adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> report = inject_adapters(model, AdapterConfig(targets=("*",), rank=2))
        >>> with norm_scope(model):
        ...     model(torch.ones(1, 8)).sum().backward()
    """
    layers = (cache or NormCache()).layers(models)
    routes = [NormRoute(layer) for layer in layers if layer.route is None]
    with _norms_of(routes, cache, models):
        yield


@contextmanager
def row_scope(
    *models: nn.Module,
    rows: Sequence[str | None],
    cache: NormCache | None = None,
    partly: bool = False,
) -> Iterator[None]:
    """Open a `norm_scope` in which each row of a batch uses the adapter named for it.

    One product with the base weight serves all rows of a Linear or Conv2d layer, and the low-rank
    products of the adapters are batched. Other layers, layers with adapters on different norm axes,
    and layers with dropout compute the rows of one adapter at a time. Results and gradients equal
    the ones of each adapter alone, up to rounding. Compiled blocks run uncompiled.

    Args:
        models: The models with adapters.
        rows: The adapter of each row; None is the base. They are repeated for a batch of a multiple
            of this size, as in guidance.
        cache: As in `norm_scope`.
        partly: The models are a part of the adapted ones: an adapter may be on none of them.

    Raises:
        ValueError: If no layer has an adapter of one of the names; in a layer's forward, if the
            batch's size is not a multiple of the number of rows.

    Example:
        >>> import torch
        >>> from dora_diffusion import AdapterConfig, inject_adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> for name in ("dog", "cat"):
        ...     report = inject_adapters(model, AdapterConfig(targets=("*",), rank=2), name=name)
        >>> with row_scope(model, rows=["dog", "cat", None, "dog"]):
        ...     tuple(model(torch.ones(4, 8)).shape)
        (4, 6)
    """
    if not rows:
        raise ValueError("no rows are given; name the adapter of each, or None for the base")
    if not partly:
        require_adapters(models, rows)
    layers = (cache or NormCache()).layers(models)
    with _norms_of([RowRoute(layer, tuple(rows)) for layer in layers], cache, models):
        yield


@contextmanager
def _norms_of(
    routes: Sequence[NormRoute], cache: NormCache | None, models: Sequence[nn.Module]
) -> Iterator[None]:
    """Route layers with the norms of their adapters; layers in an open scope keep its norms."""
    entries = [
        (route, *pair) for route in routes if route.layer.route is None for pair in route.active()
    ]
    if cache is not None:
        scales = cache.scales(entries)
    elif entries and torch.is_grad_enabled():  # Probably a step of a loop.
        layouts = _LAYOUTS.setdefault(models[0], LayoutCache())
        scales = scales_of(layouts.of(*_columns(entries))[0])
    else:
        scales = make_scales([route.layer.site([adapter]) for route, _, adapter in entries])
    for (route, name, adapter), layer_scales in zip(entries, scales, strict=True):
        if layer_scales is not None:
            route.keep(name, adapter, layer_scales)
    hook = register_optimizer_step_post_hook(_count_written)
    try:
        with routed([route.layer for route in routes], routes):
            yield
    finally:
        hook.remove()


def _columns(entries: Sequence[Entry]) -> tuple[list[AdaptedLayer], list[list[LayerAdapter]]]:
    """Return the layers and the adapters of entries, as `LayoutCache` takes them."""
    return [route.layer for route, _, _ in entries], [[adapter] for _, _, adapter in entries]


def _count_written(optimizer: torch.optim.Optimizer, *args: Any) -> None:
    """Increment the versions of stepped parameters, as fused optimizers and ``.data`` do not."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                increment_version(parameter)
