"""Norms computed once for as long as no parameter changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import NamedTuple

from torch import nn

from dora_diffusion.adapters.layer_adapter import LayerAdapter
from dora_diffusion.adapters.layers import AdaptedLayer, adapted_layers
from dora_diffusion.numerics.prepare.deferred import DeferredFlags
from dora_diffusion.numerics.prepare.factors import LayerScales, PlanInputs
from dora_diffusion.numerics.prepare.layout import Layout, layouts_of
from dora_diffusion.numerics.prepare.plan import make_scales, scales_of
from dora_diffusion.numerics.weights import Strengths


class Loop:
    """What a loop of steps keeps from one `norm_scope` to the next.

    For a loop in which nothing but its optimizer changes parameters, and no layer gets its first
    adapter: then a step neither waits for the device nor looks for what it found before. Adapters
    may be switched on and off, merged and moved between the steps.
    """

    def __init__(self) -> None:
        self.flags = DeferredFlags()
        self._models: tuple[nn.Module, ...] = ()
        self._layers: list[AdaptedLayer] = []
        self._kept: tuple[list[_Entry], list[Layout]] = [], []

    def layers(self, models: Sequence[nn.Module]) -> list[AdaptedLayer]:
        """The adapted layers of some models, looked for where these are not the ones of before."""
        same = len(models) == len(self._models) and all(map(is_, models, self._models))
        if not (same and self._layers):
            self._models = tuple(models)
            self._layers = _layers_of(models)
        return [layer for layer in self._layers if isinstance(layer, AdaptedLayer)]

    def scales(self, layers: Sequence[AdaptedLayer]) -> tuple[list[_Entry], list[LayerScales]]:
        """The layers' active adapters, and the scales of each."""
        entries, layouts = self._kept
        if not _are_current(entries, layers):
            entries = _entries_of(layers)
            layouts = layouts_of([entry.inputs for entry in entries])
            # What a direction or a strength made of parameters is of this step alone.
            self._kept = (entries, layouts) if _are_current(entries, layers) else ([], [])
        return entries, scales_of(layouts, self.flags)


@contextmanager
def norm_scope(*models: nn.Module, loop: Loop | None = None) -> Iterator[None]:
    """Compute each adapter's norm once inside the block, in which no parameter may change.

    Open one around the forward and backward passes of one optimizer step, as the training loop
    does, and one around all steps of a sampling run. No norm survives the block, so that one from
    old parameters cannot be used.

    Without one the results are the same, but every call of every adapted layer computes its norm
    from the whole weight, again when gradient checkpointing recomputes it, and on a GPU waits for
    the device: 609 times for a forward pass of SDXL, where a block waits once.

    Args:
        models: The models with adapters.
        loop: For a loop of steps in which nothing but its optimizer changes anything, one for the
            whole loop: then a block does not wait either.

    Example:
        >>> import torch
        >>> from dora_diffusion import AdapterConfig, inject_adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> report = inject_adapters(model, AdapterConfig(targets=("*",), rank=2))
        >>> with norm_scope(model):
        ...     model(torch.ones(1, 8)).sum().backward()
    """
    layers = _layers_of(models) if loop is None else loop.layers(models)
    opened = [layer for layer in layers if layer._scales_cache is None]
    _open_caches(opened, loop)
    try:
        yield
    finally:
        _close_caches(opened)


class _Entry(NamedTuple):
    """One active adapter of a layer."""

    layer: AdaptedLayer
    name: str
    strengths: Strengths
    inputs: PlanInputs

    def is_current(self, adapter: LayerAdapter) -> bool:
        """Whether the inputs are what they would be if they were made now."""
        weights, own = self.inputs.weights, adapter._parameters
        return (
            own["down"] is weights.down
            and own["up"] is weights.up
            # And not what a strength makes of it, which is a tensor of its own.
            and own["magnitude"] is self.inputs.magnitude
            and adapter.strengths is self.strengths
            and adapter.alpha == weights.alpha
            and self.layer._parameters.get("bias") is self.inputs.bias
            and self.layer.keep_output == self.inputs.keep_output
            # Of another weight there are other statistics.
            and self.layer._weight_statistics(weights.norm_axis) is self.inputs.statistics
        )


def _layers_of(models: Sequence[nn.Module]) -> list[AdaptedLayer]:
    return [layer for model in models for _, layer in adapted_layers(model)]


def _active(layers: Sequence[AdaptedLayer]) -> Iterator[tuple[AdaptedLayer, str, LayerAdapter]]:
    """The active adapters with a magnitude."""
    for layer in layers:
        for name, adapter in layer.active():
            if adapter._parameters.get("magnitude") is not None:
                yield layer, name, adapter


def _entries_of(layers: Sequence[AdaptedLayer]) -> list[_Entry]:
    return [
        _Entry(layer, name, adapter.strengths, layer._plan_inputs(adapter))
        for layer, name, adapter in _active(layers)
    ]


def _are_current(entries: Sequence[_Entry], layers: Sequence[AdaptedLayer]) -> bool:
    found = iter(entries)
    for _, _, adapter in _active(layers):
        entry = next(found, None)
        if entry is None or not entry.is_current(adapter):
            return False
    return next(found, None) is None


def _open_caches(layers: Sequence[AdaptedLayer], loop: Loop | None) -> None:
    """Compute every active adapter's scales now, all together, until `_close_caches`."""
    if loop is None:
        entries = _entries_of(layers)
        scales = make_scales([entry.inputs for entry in entries])
    else:
        entries, scales = loop.scales(layers)
    for layer in layers:
        # Past `nn.Module.__setattr__`, which takes longer than all else here.
        vars(layer)["_scales_cache"] = {}
    for entry, own in zip(entries, scales, strict=True):
        vars(entry.layer)["_scales_cache"][entry.name] = own


def _close_caches(layers: Sequence[AdaptedLayer]) -> None:
    """Forget the scales of layers, some of which may be plain again."""
    for layer in layers:
        if isinstance(layer, AdaptedLayer):
            vars(layer)["_scales_cache"] = None
