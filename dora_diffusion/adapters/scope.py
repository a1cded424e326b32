"""Norms computed once for as long as no parameter changes, and rows of a batch with adapters of
their own.

With the norm detached (paper, section 4.3), an adapted layer is ``g_k (W x + b) + B'_k (A_k x)``
and a shift: what differs between the adapters of rows is thin, and is batched beside the one dense
product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from dora_diffusion.adapters.inject import require_adapters
from dora_diffusion.adapters.layers import (
    Active,
    AdaptedLayer,
    LayerAdapter,
    LayoutCache,
    adapted_layers,
    state_of,
)
from dora_diffusion.adapters.plan import FixedScales, LayerScales, make_scales, scales_of
from dora_diffusion.adapters.route import Route, forward_rows, routed
from dora_diffusion.numerics.dora import Factors
from dora_diffusion.numerics.operation import ConvOperation, Operation

Entry = tuple[Route, str, LayerAdapter]
"""The route of a layer, and an adapter of that layer by name."""


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
        self._models: tuple[nn.Module, ...] = ()
        self._layers: list[AdaptedLayer] = []
        self._changes = -1
        self._layouts = LayoutCache()

    def layers(self, models: tuple[nn.Module, ...]) -> list[AdaptedLayer]:
        """The adapted layers of some models, looked for where they may not be those of before."""
        # Modules are compared by identity.
        if self._models != models or self._changes != AdaptedLayer.changes:
            self._models, self._changes = models, AdaptedLayer.changes
            self._layers = [layer for model in models for _, layer in adapted_layers(model)]
        return self._layers

    def scales(self, entries: Sequence[Entry]) -> Sequence[LayerScales | FixedScales | None]:
        """The scales of each adapter, as far as it has any that are kept."""
        layers, adapters = [route.layer for route, _, _ in entries], [[a] for _, _, a in entries]
        return scales_of(self._layouts.of(layers, adapters)[0], self._layouts.flags)


class FixedNorms(NormCache):
    """Norms that stay from one `norm_scope` to the next, of adapters that do not train.

    Those of an adapter are computed when it is first used, and again where one of its parameters,
    its strengths or the base weight is another than it was. For sampling alone: the factors have no
    gradients. They are let go with the adapter.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fixed: WeakKeyDictionary[LayerAdapter, tuple[object, FixedScales]]
        self._fixed = WeakKeyDictionary()

    def scales(self, entries: Sequence[Entry]) -> Sequence[LayerScales | FixedScales | None]:
        """The scales of each adapter with a magnitude."""
        nothing: tuple[object, None] = None, None
        missing: dict[str, list[tuple[AdaptedLayer, LayerAdapter, object]]] = {}
        for route, name, adapter in entries:
            layer = route.layer
            state: object = (adapter.versions(), state_of([layer], [[adapter]]))
            if adapter.magnitude is not None and self._fixed.get(adapter, nothing)[0] != state:
                missing.setdefault(name, []).append((layer, adapter, state))
        # Each adapter by itself: what it is made of leaves with it.
        for parts in missing.values():
            sites = [layer.site([adapter]) for layer, adapter, _ in parts]
            for (_, adapter, state), site, own in zip(
                parts, sites, make_scales(sites), strict=True
            ):
                self._fixed[adapter] = state, FixedScales(site, own)
        return [self._fixed.get(adapter, nothing)[1] for _, _, adapter in entries]


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
    with _norms_of([Route(layer) for layer in layers if layer.route is None], cache):
        yield


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
    with _norms_of([RowRoute(layer, tuple(rows)) for layer in layers], cache):
        yield


@contextmanager
def _norms_of(routes: Sequence[Route], cache: NormCache | None) -> Iterator[None]:
    """Route layers with the norms of their adapters, unless an open scope has these already."""
    entries = [
        (route, *each) for route in routes if route.layer.route is None for each in route.active()
    ]
    scales = (
        make_scales([route.layer.site([adapter]) for route, _, adapter in entries])
        if cache is None
        else cache.scales(entries)
    )
    for (route, name, adapter), kept in zip(entries, scales, strict=True):
        if kept is not None:
            route.keep(name, adapter, kept)
    hook = register_optimizer_step_post_hook(_count_written)
    try:
        with routed([route.layer for route in routes], routes):
            yield
    finally:
        hook.remove()


def _count_written(optimizer: torch.optim.Optimizer, *args: Any) -> None:
    """Count what an optimizer wrote: fused ones, and those that write to ``.data``, do not."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                increment_version(parameter)


class RowRoute(Route):
    """Route of a layer in a `row_scope`.

    Args:
        layer: The layer.
        names: Adapter of each row; None is the base. A batch of a multiple of so many rows repeats
            them, as guidance does.
    """

    is_mixed = True

    def __init__(self, layer: AdaptedLayer, names: tuple[str | None, ...]) -> None:
        super().__init__(layer)
        if layer.route is not None:
            self.norms, self._versions = layer.route.norms, layer.route._versions
        self.names = names
        self._factors: dict[tuple[Any, ...], Factors | None] = {}

    def active(self) -> Active:
        return [each for each in self.layer.active() if each[0] in self.names]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, each row with its own adapter.

        Raises:
            ValueError: If the batch's size is not a multiple of the number of rows.
        """
        layer, active = self.layer, self.active()
        if len(set(self.names)) == 1 or not active or layer.is_merged:
            return layer.adapted(x, active)
        is_batch = layer.kind == "embedding" or x.ndim >= layer.weight.ndim
        names = self._repeated(len(x) if is_batch else 1)
        if _are_batched(layer, active):
            inputs, matrix, bias = layer.operands(x)
            assert isinstance(inputs, Tensor)
            if (factors := self._factors_of_rows(active, names, inputs.dtype)) is not None:
                return forward_rows(layer.operation(), inputs, matrix, bias, factors)
        return _each_by_itself(layer, x, names, active)

    def forget(self, name: str | None = None) -> None:
        super().forget(name)
        self._factors.clear()

    def _repeated(self, batch: int) -> tuple[str | None, ...]:
        repeats, rest = divmod(batch, len(self.names))
        if rest or not repeats:
            raise ValueError(
                f"a layer is called with a batch of {batch}, and adapters are given for "
                f"{len(self.names)} rows; give one per row of the batch"
            )
        return self.names * repeats

    def _factors_of_rows(
        self, active: Active, names: Sequence[str | None], dtype: torch.dtype
    ) -> Factors | None:
        """Each row's factors, stacked; None where the gradient of m needs a path of its own."""
        layer, used = self.layer, [(name, own.strengths.strength) for name, own in active]
        key = (dtype, len(names), torch.is_grad_enabled(), *used)
        for name, adapter in active:
            if name in self.norms and not self.require_unchanged(name, adapter):
                self._factors.clear()
        if key not in self._factors:
            own = {
                name: _folded(layer.factors(name, adapter, dtype), adapter.strengths.strength)
                for name, adapter in active
            }
            trains = torch.is_grad_enabled() and any(f.gain is not None for f in own.values())
            gain_in_graph = trains and any(f.gain_in_graph for f in own.values())
            self._factors[key] = None if gain_in_graph else _stacked(own, names)
        return self._factors[key]


def _are_batched(layer: AdaptedLayer, active: Active) -> bool:
    """Return whether one product serves these adapters; others run one adapter at a time."""
    op = layer.operation()
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


def _each_by_itself(
    layer: AdaptedLayer, x: Tensor, names: Sequence[str | None], active: Active
) -> Tensor:
    """Rows of one adapter after those of another, put back in their order."""
    made, places = [], []
    for name in dict.fromkeys(names):
        at = [place for place, other in enumerate(names) if other == name]
        made.append(layer.adapted(x[at], [each for each in active if each[0] == name]))
        places += at
    order = torch.tensor(places, device=x.device).argsort()
    return torch.cat(made).index_select(0, order)
