"""Norms computed once for as long as no parameter changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from dora_diffusion.adapters.inject import require_adapters
from dora_diffusion.adapters.kinds import layer_groups
from dora_diffusion.adapters.layers import AdaptedLayer, LayerAdapter, adapted_layers
from dora_diffusion.adapters.rows import Rows, StackedRows
from dora_diffusion.numerics.prepare.factors import LayerScales, PlanInputs
from dora_diffusion.numerics.prepare.layout import DeferredFlags, Layout, layouts_of
from dora_diffusion.numerics.prepare.plan import make_scales, scales_of
from dora_diffusion.numerics.prepare.stack import Stack
from dora_diffusion.numerics.prepare.stack_layout import StackedLayer, Vector
from dora_diffusion.numerics.weights import Strengths


class NormCache:
    """What a loop of training steps keeps from one `norm_scope` to the next.

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
        self.flags = DeferredFlags()
        self._models: tuple[nn.Module, ...] = ()
        self._layers: list[AdaptedLayer] = []
        self._changes = -1
        self._kept: tuple[list[_Entry], list[Layout]] = [], []

    def layers(self, models: tuple[nn.Module, ...]) -> list[AdaptedLayer]:
        """The adapted layers of some models, looked for where they may not be those of before."""
        # Modules are compared by identity.
        if self._models != models or self._changes != AdaptedLayer.changes:
            self._models, self._changes = models, AdaptedLayer.changes
            self._layers = [layer for model in models for _, layer in adapted_layers(model)]
        return self._layers

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
            batch's size is no multiple of the number of rows.

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


def stack_of(
    layers: Sequence[AdaptedLayer],
    adapters: Sequence[Sequence[LayerAdapter]],
    vectors: Sequence[Vector],
) -> Stack:
    """K adapters, which need not be on the layers, as one stack.

    Args:
        layers: The layers.
        adapters: Of each layer the K adapters, in the same order.
        vectors: The parameters of each of the K.

    Raises:
        ValueError: If a layer is an Embedding or a grouped convolution, or adapters have other
            magnitudes than each other, another parametrization than A and B, or dropout.
    """
    for layer, own in zip(layers, adapters, strict=True):
        is_plain = layer.kind != "embedding" and layer_groups(layer) == 1
        alike = {(a.magnitude is None, a.norm_axis) for a in own}
        if not is_plain or len(alike) > 1 or any(a.parametrization or a.dropout for a in own):
            raise ValueError(
                "adapters can be trained together on Linear layers and convolutions without "
                "groups, all DoRA on one norm axis or all LoRA, without dropout"
            )
    stacked = [
        StackedLayer(
            layer.matrix,
            layer.bias,
            layer._weight_statistics(own[0].norm_axis),
            [adapter.weights() for adapter in own],
            layer.keep_output,
        )
        for layer, own in zip(layers, adapters, strict=True)
    ]
    return Stack(stacked, vectors)


@contextmanager
def stack_scope(layers: Sequence[AdaptedLayer], stack: Stack) -> Iterator[StackedRows]:
    """Inside, the layers have the adapters of a stack as they are now, in rows that it chooses.

    No parameter may change inside. Gradients are left in the stack.

    Args:
        layers: Those that the stack was made of.
        stack: The adapters.
    """
    stack.refresh()
    rows = StackedRows(stack, {layer: number for number, layer in enumerate(layers)})
    for layer in layers:
        vars(layer)["_rows"] = rows
    try:
        yield rows
    finally:
        for layer in layers:
            vars(layer)["_rows"] = None


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
    inputs: PlanInputs

    def is_current(self, adapter: LayerAdapter) -> bool:
        """Whether the inputs are what they would be if they were made now."""
        weights, own, layer = self.inputs.weights, adapter._parameters, self.layer
        return (
            own["down"] is weights.down
            and own["up"] is weights.up
            # And not what a strength makes of it, which is a tensor of its own.
            and own["magnitude"] is self.inputs.magnitude
            and adapter.strengths is self.strengths
            and adapter.alpha == weights.alpha
            and layer._parameters.get("bias") is self.inputs.bias
            and layer.keep_output == self.inputs.keep_output
            # Of another weight there are other statistics.
            and layer._weight_statistics(weights.norm_axis) is self.inputs.statistics
        )


def _active(layers: Sequence[AdaptedLayer]) -> list[tuple[AdaptedLayer, str, LayerAdapter]]:
    """The active adapters with a magnitude."""
    return [
        (layer, name, adapter)
        for layer in layers
        for name, adapter in layer.active()
        if adapter._parameters.get("magnitude") is not None
    ]


def _entries_of(layers: Sequence[AdaptedLayer]) -> list[_Entry]:
    return [
        _Entry(layer, name, adapter.strengths, layer._plan_inputs(adapter))
        for layer, name, adapter in _active(layers)
    ]


def _are_current(entries: Sequence[_Entry], layers: Sequence[AdaptedLayer]) -> bool:
    active = _active(layers)
    return len(active) == len(entries) and all(
        entry.is_current(adapter) for entry, (_, _, adapter) in zip(entries, active, strict=True)
    )


def _open_caches(layers: Sequence[AdaptedLayer], cache: NormCache | None) -> None:
    """Compute every active adapter's scales now, all together, until they are forgotten."""
    if cache is None:
        entries = _entries_of(layers)
        scales = make_scales([entry.inputs for entry in entries])
    else:
        entries, scales = cache.scales(layers)
    for layer in layers:
        # Past `nn.Module.__setattr__`, which takes longer than all else here.
        vars(layer)["_scales_cache"] = {}
    for entry, own in zip(entries, scales, strict=True):
        entry.layer.keep_scales(entry.name, own)
