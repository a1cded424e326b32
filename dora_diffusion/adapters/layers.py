"""Layers that carry adapters, and the parameters of one adapter on one layer.

An adapted layer is the original module with its class replaced. It keeps its parameters, buffers,
hooks and place in the model, so the base model's state dict, dtype and device handling do not
change. Adapters are in the child module ``adapters``.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.flags import DeferredFlags
from dora_diffusion.adapters.layout import Layout, layouts_of
from dora_diffusion.adapters.route import Route, Scales
from dora_diffusion.adapters.scales import make_scales
from dora_diffusion.adapters.shard import RowShard
from dora_diffusion.adapters.site import Site, WeightStatistics
from dora_diffusion.numerics.dora import (
    Factors,
    direction_of,
    factors_of,
    interpolated_magnitude,
    sum_of_adapters,
)
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.operation import OneHot, Operation, dropout
from dora_diffusion.numerics.precision import product_dtype, upcast_dtype
from dora_diffusion.numerics.weights import (
    LayerKind,
    LayerWeights,
    NormAxis,
    Strengths,
    out_in,
)

if TYPE_CHECKING:
    from dora_diffusion.adapters.parametrizations import Parametrization

_LINEAR, _VERSION = Operation(), attrgetter("_version")


class LayerAdapter(nn.Module):
    """The parameters of one adapter on one layer, float32, and its strengths.

    Attributes:
        down, up: As in `LayerWeights`, or the inputs of ``parametrization``.
        magnitude, alpha, norm_axis, kind, groups: As in `LayerWeights`.
        parametrization: Module that computes A and B. None: A and B are ``down`` and ``up``.
        strengths: Strengths of the adapter, initially 1.
        enabled: False switches the adapter off.

    Args:
        weights: Initial weights.
        dropout: As in `AdapterConfig`.
        parametrization: See above.
        trained: Initial ``down`` and ``up``, from which the parametrization computes ``weights``.
    """

    magnitude: nn.Parameter | None
    parametrization: Parametrization | None

    def __init__(
        self,
        weights: LayerWeights,
        dropout: float = 0.0,
        parametrization: Parametrization | None = None,
        trained: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        down, up = trained or (weights.down, weights.up)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        magnitude = weights.magnitude
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.parametrization = parametrization
        self.alpha = weights.alpha
        self.norm_axis: NormAxis = weights.norm_axis
        self.kind: LayerKind = weights.kind
        self.groups = weights.groups
        self.dropout = dropout
        self.strengths = Strengths()
        self.enabled = True

    def weights(self, strength: float = 1.0) -> LayerWeights:
        """Return the weights: the parameters themselves, or the parametrization's output.

        Args:
            strength: Factor of alpha, and so of the scale.
        """
        down, up = self.down, self.up
        if self.parametrization is not None:
            # The first caller may run without gradients, and a norm scope caches the result.
            with torch.enable_grad():
                down, up = self.parametrization(down, up)
        alpha = strength * self.alpha
        return LayerWeights(down, up, self.magnitude, alpha, self.norm_axis, self.kind, self.groups)

    def versions(self) -> tuple[int, ...]:
        """Return the identity and in-place version of each parameter of a DoRA."""
        parameters = [*self._parameters.values()]
        if self.parametrization is not None:
            parameters += self.parametrization._parameters.values()
        try:
            return *map(id, parameters), *map(_VERSION, parameters)
        except RuntimeError:  # Inference tensors have no version counter.
            return tuple(map(id, parameters))

    @property
    def is_plain(self) -> bool:
        """True if the layer's `Site` has the parameters themselves, not derived tensors."""
        strengths = self.strengths.direction_strength, self.strengths.magnitude_strength
        return self.parametrization is None and strengths == (1, 1)

    def scaled_weights(self) -> LayerWeights:
        """Return `weights` with the direction's strength in the scale."""
        return self.weights(self.strengths.direction_strength)

    @torch.no_grad()
    def used_weights(self) -> LayerWeights:
        """Return the weights for a file: `weights` without ranks that are switched off."""
        weights = self.weights()
        used = None if self.parametrization is None else self.parametrization.used()
        if used is None or bool(used.all()):
            return weights
        down, up = weights.down[used], weights.up[:, used]
        alpha = weights.alpha * down.shape[0] / weights.rank  # Keep the scale.
        return dataclasses.replace(weights, down=down, up=up, alpha=alpha)

    def extra_repr(self) -> str:
        """Return the text that ``print(model)`` shows."""
        kind = "LoRA" if self.magnitude is None else f"DoRA, norm_axis={self.norm_axis}"
        return f"{kind}, rank={self.down.shape[0]}, alpha={self.alpha:g}"


Active = Sequence[tuple[str, LayerAdapter]]
"""Adapters that change the output, with their names."""


class AdaptedLayer(nn.Module):
    """Mixin of layers with adapters. Created by `kinds.adapt_layer` only.

    Attributes:
        kind: How the weight is stored.
        shard: Rows of a sharded weight that this process holds between calls; None if unsharded.
        route: The layer's route in the open scope; None outside of scopes.
    """

    kind: LayerKind = "plain"
    shard: RowShard | None = None
    weight: nn.Parameter
    bias: nn.Parameter | None
    adapters: nn.ModuleDict
    keep_output: bool
    # Counts first adapters attached and last adapters removed, on layers of all models.
    changes: ClassVar[int] = 0
    # Plain attributes, not in the state dict: the scope's route, a cache, and the weight that a
    # merge replaced.
    route: Route | None
    _statistics: tuple[tuple[Any, ...], WeightStatistics] | None
    _unmerged: Tensor | None

    @property
    def is_merged(self) -> bool:
        """True if the adapters are merged into the weight."""
        return self._unmerged is not None

    def dense(self, dtype: torch.dtype | None = None, *, local: bool = False) -> Tensor:
        """Return the base weight ``(out, in, *k)``.

        Args:
            dtype: Dtype of the result; None keeps the stored one.
            local: Return only this process's rows of a sharded weight.
        """
        weight: Tensor = self.weight
        if local and self.shard is not None:
            # The weight is whole inside of its module's forward, and a DTensor outside.
            to_local = getattr(weight, "to_local", None)
            weight = to_local() if to_local else self.shard.own(weight)
        weight = out_in(weight, self.kind)
        return weight if dtype is None else weight.to(dtype)

    def operation(self) -> Operation:
        """Return the operation of the weight on an input."""
        return _LINEAR

    @property
    def is_prepared(self) -> bool:
        """True if the operation needs no `prepare` of its input."""
        return self.kind != "embedding"

    def prepare(self, x: Tensor) -> Tensor | OneHot:
        """Return the operation's input: ids as one-hot vectors, and padding that it cannot do."""
        return x

    def active(self) -> Active:
        """Return the adapters that change the output."""
        adapters = cast("dict[str, LayerAdapter]", self.adapters._modules)
        return [
            (name, adapter)
            for name, adapter in adapters.items()
            if adapter.enabled and adapter.strengths.strength != 0
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the adapted layer, or of the base if adapters are off or merged.

        Outside of a norm scope, each call computes the norm from the whole weight, and synchronizes
        with the device to check for ill-conditioned channels.

        Raises:
            RuntimeError: If the base weight or bias requires a gradient.
        """
        route = self.route
        if route is None or torch.compiler.is_compiling():
            return self.adapted(x, self.active())
        ready = route.ready.get(x.dtype)
        if ready is None or torch._C._is_any_autocast_enabled():
            return route.forward(x)
        return ready(x)

    def adapted(self, x: Tensor, active: Active) -> Tensor:
        """Return the layer's output with the given adapters."""
        if self._unmerged is not None or not active:
            base: Tensor = super().forward(x)
            return base
        terms, (inputs, matrix, added) = [], self.operands(x)
        for name, adapter in active:
            factors = self.factors(name, adapter, inputs.dtype)
            dropped = dropout(inputs, adapter.dropout, self.training)
            terms.append((factors, adapter.strengths.strength, dropped))
        return sum_of_adapters(self.operation(), inputs, matrix, added, terms)

    def operands(self, x: Tensor) -> tuple[Tensor | OneHot, Tensor, Tensor | None]:
        """Return the input, the weight ``(out, in, *k)`` and the bias, all of one dtype."""
        bias = self.bias
        if self.weight.requires_grad or (bias is not None and bias.requires_grad):
            raise RuntimeError(
                "the base weight or bias of an adapted layer requires a gradient; freeze it "
                "(requires_grad_(False)): only the adapter is trained"
            )
        # Cast as autocast would for this operation; autocast does not cast ids.
        inputs = self.prepare(x.to(product_dtype(x)) if x.is_floating_point() else x)
        added = None if bias is None else bias.to(inputs.dtype)
        return inputs, self.dense(inputs.dtype), added

    def factors(self, name: str, adapter: LayerAdapter, dtype: torch.dtype) -> Factors:
        """Return an adapter's factors in a dtype, from a plan or else computed here."""
        if not torch.compiler.is_compiling():
            scales = self.scales(name, adapter)
            if scales is not None:
                factors = scales.factors(dtype)
                if self.shard is None or not factors.gain_in_graph:
                    return factors
                # A plan has no whole weight.
                direction = direction_of(self.dense(), adapter.scaled_weights(), dtype)
                return factors._replace(direction=direction)
        # Torch cannot trace a plan: use the scope's factors, or compute them in the graph.
        elif self.route is not None and name in self.route.norms:
            factors_by_dtype = self.route.norms[name].factors_by_dtype
            if dtype in factors_by_dtype:
                return factors_by_dtype[dtype]
        strength = adapter.strengths.magnitude_strength
        return factors_of(self.dense(), self.bias, adapter.scaled_weights(), dtype, strength)

    def scales(self, name: str, adapter: LayerAdapter) -> Scales | None:
        """Return norm and gain of one adapter, from the open scope or computed here.

        None for a LoRA that changed in its scope, or outside of scopes.
        """
        route = self.route
        return self.computed_scales(adapter) if route is None else route.scales(name, adapter)

    def computed_scales(self, adapter: LayerAdapter) -> Scales | None:
        """Compute norm and gain of one adapter; None for LoRA."""
        return None if adapter.magnitude is None else make_scales([self.site([adapter])])[0]

    @torch.no_grad()
    def site(self, adapters: Sequence[LayerAdapter]) -> Site:
        """Return the layer's `Site` for a plan. The adapters need not be attached."""
        matrix, weights_of_adapters = self.dense(local=True), []
        for adapter in adapters:
            weights = adapter.scaled_weights()
            if weights.magnitude is not None:
                strength = adapter.strengths.magnitude_strength
                magnitude = interpolated_magnitude(matrix, weights, strength)
                weights = dataclasses.replace(weights, magnitude=magnitude)
            weights_of_adapters.append(weights)
        statistics = self.statistics(adapters[0])
        return Site(
            matrix, self.bias, weights_of_adapters, statistics, self.keep_output, self.shard
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy, which belongs to no scope."""
        return {**self.__dict__, "route": None}

    def statistics(self, adapter: LayerAdapter) -> WeightStatistics | None:
        """Return the base weight's statistics for an adapter, cached until the weight changes."""
        if adapter.magnitude is None:
            return None
        axis, weight = adapter.norm_axis, self.dense(local=True)
        key = axis, *identities([weight])[0]
        if self._statistics is None or self._statistics[0] != key:
            self._statistics = key, WeightStatistics(weight.detach(), axis, self.shard)
        return self._statistics[1]

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the weight with all active adapters merged, float32, in the stored layout."""
        weight = self.dense()
        layers = [
            (dataclasses.replace(adapter.weights(), kind="plain"), adapter.strengths)
            for _, adapter in self.active()
        ]
        return out_in(merge_tensor(weight, layers, upcast_dtype(weight)), self.kind)

    @torch.no_grad()
    def merge(self, merged: Tensor) -> None:
        """Write the result of `merged` into the weight. `unmerge` restores the base weight."""
        if self._unmerged is None:
            before = self.weight.detach().clone()
            self.weight.copy_(merged)
            self._unmerged = before

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight, bit for bit."""
        if self._unmerged is not None:
            self.weight.copy_(self._unmerged)
            self._unmerged = None


def identities(weights: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Return a key for each weight. The key changes when the weight is written."""
    try:
        return [(w.data_ptr(), w._version, w.dtype, w.device) for w in weights]
    except RuntimeError:  # Inference tensors have no version counter.
        return [
            (w.data_ptr(), None if w.is_inference() else w._version, w.dtype, w.device)
            for w in weights
        ]


def state_of(layers: Sequence[AdaptedLayer], adapters: Sequence[Sequence[LayerAdapter]]) -> object:
    """Return a key of everything that layouts depend on, except the values of parameters."""
    weights = [
        weight if layer.shard is None else layer.dense(local=True)
        for layer in layers
        if (weight := layer._parameters["weight"]) is not None
    ]
    return (
        identities(weights),
        [(layer.keep_output, id(layer._parameters.get("bias"))) for layer in layers],
        [
            (*map(id, a._parameters.values()), a.alpha, a.strengths)
            for group in adapters
            for a in group
        ],
    )


class LayoutCache:
    """Cache of the layouts of layers with K adapters each.

    A change of parameter values keeps the cache. Any other change (`state_of`) drops it.

    Attributes:
        flags: Flags of each layout, read one step late.
    """

    def __init__(self) -> None:
        self.flags: defaultdict[Any, DeferredFlags] = defaultdict(DeferredFlags)
        self._layouts: dict[Any, Layout] = {}
        self._state: object = None

    @property
    def is_kept(self) -> bool:
        """True if the last layouts serve the next step too."""
        return self._state is not None

    def of(
        self, layers: Sequence[AdaptedLayer], adapters: Sequence[Sequence[LayerAdapter]]
    ) -> tuple[dict[Any, Layout], bool]:
        """Return the layouts by `_division`, and whether they are new."""
        state = state_of(layers, adapters)
        if state == self._state:
            return self._layouts, False
        pairs = zip(layers, adapters, strict=True)
        layouts = layouts_of([layer.site(group) for layer, group in pairs])
        # Tensors derived by a parametrization or strength are valid for this step only.
        is_kept = all(a.is_plain for group in adapters for a in group)
        self._state, self._layouts = (state, layouts) if is_kept else (None, {})
        return layouts, True


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a model's modules with their paths, in the order of ``named_modules``.

    Modules of adapters are skipped.
    """
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[int] = set()
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        is_adapted = isinstance(module, AdaptedLayer)
        for name, child in reversed(module._modules.items()):
            if child is not None and not (is_adapted and name == "adapters"):
                waiting.append((f"{path}.{name}" if path else name, child))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Yield each adapted layer of a model with its path, in the order of ``named_modules``."""
    for path, module in own_modules(model):
        if isinstance(module, AdaptedLayer):
            yield path, module
