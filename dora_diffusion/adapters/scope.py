"""Norms computed once for as long as no parameter changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from dora_diffusion.adapters.inject import require_adapters
from dora_diffusion.adapters.layers import AdaptedLayer, LayerAdapter, adapted_layers
from dora_diffusion.adapters.norms.factors import Site
from dora_diffusion.adapters.norms.layout import DeferredFlags, Layout, layouts_of
from dora_diffusion.adapters.norms.plan import FixedScales, LayerScales, make_scales, scales_of
from dora_diffusion.adapters.rows import Rows
from dora_diffusion.numerics.weights import Strengths


class NormCache:
    """Cache that a loop of training steps keeps from one `norm_scope` to the next.

    Make one before the loop and give it to each step's scope. A step then neither waits for the
    device nor looks again for what it found before. Between the steps, adapters may be added and
    removed, switched on and off, merged and moved; but no base weight may be written through
    ``.data``, which on CUDA is noticed a step late.

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
        self.flags: defaultdict[Any, DeferredFlags] = defaultdict(DeferredFlags)
        self._models: tuple[nn.Module, ...] = ()
        self._layers: list[AdaptedLayer] = []
        self._changes = -1
        self._kept: tuple[list[_Entry], dict[Any, Layout]] = [], {}

    def layers(self, models: tuple[nn.Module, ...]) -> list[AdaptedLayer]:
        """The adapted layers of some models, looked for where they may not be those of before."""
        # Modules are compared by identity.
        if self._models != models or self._changes != AdaptedLayer.changes:
            self._models, self._changes = models, AdaptedLayer.changes
            self._layers = [layer for model in models for _, layer in adapted_layers(model)]
        return self._layers

    def scales(
        self, layers: Sequence[AdaptedLayer]
    ) -> tuple[Sequence[_Entry], Sequence[LayerScales | FixedScales]]:
        """The layers' active adapters, and the scales of each."""
        entries, layouts = self._kept
        if not _are_current(entries, layers):
            entries = _entries_of(layers)
            layouts = layouts_of([entry.site for entry in entries])
            # What a direction or a strength made of parameters is of this step alone.
            self._kept = (entries, layouts) if _are_current(entries, layers) else ([], {})
        return entries, scales_of(layouts, self.flags)


class FixedNorms(NormCache):
    """Norms that stay from one `norm_scope` to the next, of adapters that do not train.

    Those of an adapter are computed when it is first used, and again where one of its parameters,
    its strengths or the base weight is another than it was. For sampling alone: the factors have no
    gradients. They are let go with the adapter.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fixed: WeakKeyDictionary[LayerAdapter, tuple[object, _Entry, FixedScales]]
        self._fixed = WeakKeyDictionary()

    def scales(
        self, layers: Sequence[AdaptedLayer]
    ) -> tuple[Sequence[_Entry], Sequence[LayerScales | FixedScales]]:
        """The layers' active adapters, and the scales of each."""
        active = [(*e, _state(e[0], e[2])) for e in _active(layers) if e[2].magnitude is not None]
        missing: dict[str, list[tuple[AdaptedLayer, LayerAdapter, object]]] = {}
        for layer, name, adapter, state in active:
            if adapter not in self._fixed or self._fixed[adapter][0] != state:
                missing.setdefault(name, []).append((layer, adapter, state))
        # Each adapter by itself: what it is made of leaves with it.
        for name, parts in missing.items():
            entries = [_Entry.of(layer, name, adapter) for layer, adapter, _ in parts]
            scales = make_scales([entry.site for entry in entries])
            for (_, adapter, state), entry, own in zip(parts, entries, scales, strict=True):
                self._fixed[adapter] = state, entry, FixedScales(entry.site, own)
        fixed = [self._fixed[adapter] for _, _, adapter, _ in active]
        return [entry for _, entry, _ in fixed], [scales for _, _, scales in fixed]


def _state(layer: AdaptedLayer, adapter: LayerAdapter) -> object:
    """Return the state that an adapter's norm on a layer depends on."""
    statistics = layer.statistics(adapter)
    settings = adapter.strengths, adapter.alpha, layer.keep_output
    return adapter.versions(), settings, id(layer._parameters.get("bias")), statistics


@contextmanager
def norm_scope(*models: nn.Module, cache: NormCache | None = None) -> Iterator[None]:
    """Compute each adapter's norm once inside the block, in which no parameter may change.

    Open one around the forward and backward passes of one optimizer step, as the training loop
    does, and one around all steps of a sampling run. No norm survives the block, and a layer that
    is called inside after a parameter of it was written or replaced raises an error. Optimizers
    of torch and those that derive from them are noticed whatever they write with; other code that
    writes through ``.data`` is not.

    Without one the results are the same, but every call of every adapted layer computes its norm
    from the whole weight, again when gradient checkpointing recomputes it, and on a GPU waits for
    the device: 609 times for a forward pass of SDXL, where a block waits once.

    Args:
        models: The models with adapters.
        cache: One for a whole loop of training steps: then a block does not wait either.

    Raises:
        RuntimeError: In a layer's forward, if its adapter changed inside of the block.

    Example:
        >>> import torch
        >>> from dora_diffusion import AdapterConfig, inject_adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> report = inject_adapters(model, AdapterConfig(targets=("*",), rank=2))
        >>> with norm_scope(model):
        ...     model(torch.ones(1, 8)).sum().backward()
    """
    layers = (cache or NormCache()).layers(models)
    opened = [layer for layer in layers if layer._scales_cache is None]
    _open_caches(opened, cache)
    noticed = register_optimizer_step_post_hook(_count_written)
    try:
        yield
    finally:
        noticed.remove()
        for layer in opened:
            if isinstance(layer, AdaptedLayer):  # Some may be plain again.
                vars(layer)["_scales_cache"] = None


@contextmanager
def row_scope(
    *models: nn.Module,
    rows: Sequence[str | None],
    cache: NormCache | None = None,
    partly: bool = False,
) -> Iterator[None]:
    """A `norm_scope` in which each row of a batch has an adapter of its own, by name.

    One product with the base weight serves all rows of a Linear or Conv2d layer, and the thin ones
    of the adapters are batched. Other layers, adapters of different norm axes in one layer, and
    dropout compute the rows of one adapter after those of another. Results and gradients are those
    of each adapter by itself, up to rounding. Compiled blocks run as they are.

    Args:
        models: The models with adapters.
        rows: The adapter of each row; None is the base. A batch of a multiple of so many rows, as
            guidance makes, repeats them.
        cache: As in `norm_scope`.
        partly: The models are some of the adapted ones: an adapter may be on none of them.

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
    own = Rows(tuple(rows))
    for layer in layers:
        vars(layer).update(_rows=own, _row_factors={})
    try:
        with norm_scope(*models, cache=cache):
            yield
    finally:
        for layer in layers:
            if isinstance(layer, AdaptedLayer):
                vars(layer).update(_rows=None, _row_factors={})


def _count_written(optimizer: torch.optim.Optimizer, *args: Any) -> None:
    """Count what an optimizer wrote: fused ones, and those that write to ``.data``, do not."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                increment_version(parameter)


class _Entry(NamedTuple):
    """One active adapter of a layer."""

    layer: AdaptedLayer
    name: str
    strengths: Strengths
    site: Site
    identity: object

    @classmethod
    def of(cls, layer: AdaptedLayer, name: str, adapter: LayerAdapter) -> _Entry:
        site = layer.site([adapter])
        return cls(layer, name, adapter.strengths, site, layer.identity())

    def is_current(self, adapter: LayerAdapter) -> bool:
        """Return whether the site still equals one that would be made now."""
        (weights,), own, layer = self.site.adapters, adapter._parameters, self.layer
        return (
            own["down"] is weights.down
            and own["up"] is weights.up
            # And not what a strength makes of it, which is a tensor of its own.
            and own.get("magnitude") is weights.magnitude
            and adapter.strengths is self.strengths
            and adapter.alpha == weights.alpha
            and layer._parameters.get("bias") is self.site.bias
            and layer.keep_output == self.site.keep_output
            and layer.identity() == self.identity
        )


def _active(layers: Sequence[AdaptedLayer]) -> list[tuple[AdaptedLayer, str, LayerAdapter]]:
    return [(layer, name, adapter) for layer in layers for name, adapter in layer.active()]


def _entries_of(layers: Sequence[AdaptedLayer]) -> list[_Entry]:
    return [_Entry.of(*each) for each in _active(layers)]


def _are_current(entries: Sequence[_Entry], layers: Sequence[AdaptedLayer]) -> bool:
    active = _active(layers)
    return len(active) == len(entries) and all(
        entry.is_current(adapter) for entry, (_, _, adapter) in zip(entries, active, strict=True)
    )


def _open_caches(layers: Sequence[AdaptedLayer], cache: NormCache | None) -> None:
    """Compute every active adapter's scales now, all together, until they are forgotten."""
    if cache is None:
        entries: Sequence[_Entry] = _entries_of(layers)
        scales: Sequence[LayerScales | FixedScales] = make_scales([e.site for e in entries])
    else:
        entries, scales = cache.scales(layers)
    for layer in layers:
        # Past `nn.Module.__setattr__`, which takes longer than all else here.
        vars(layer)["_scales_cache"] = {}
    for entry, own in zip(entries, scales, strict=True):
        entry.layer.keep_scales(entry.name, own)
