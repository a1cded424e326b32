"""Layers that carry adapters, and the parameters of one adapter on one layer.

An adapted layer *is* the layer that it was, of another class: its parameters, buffers, hooks and
places in the model, so that the base model's state dict, dtype and device handling stay as they
were. Adapters live in the child module ``adapters``.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.layout import (
    DeferredFlags,
    Layout,
    RowShard,
    Site,
    WeightStatistics,
    layouts_of,
)
from dora_diffusion.adapters.plan import make_scales
from dora_diffusion.adapters.route import Route, Scales
from dora_diffusion.config.arguments import mismatch
from dora_diffusion.config.fields import ConfigError
from dora_diffusion.numerics.dora import (
    Factors,
    direction_of,
    dora_forward,
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
    """The parameters of one adapter on one layer, float32, and how strongly it acts.

    Attributes:
        down, up: As in `LayerWeights`, or what ``parametrization`` makes these from.
        magnitude, alpha, norm_axis, kind, groups: As in `LayerWeights`.
        parametrization: What makes A and B; None: they are ``down`` and ``up``.
        strengths: Its strengths; those of a new adapter are 1.
        enabled: False switches the adapter off.

    Args:
        weights: What it starts as.
        dropout: As in `AdapterConfig`.
        parametrization: See above.
        trained: ``down`` and ``up`` that the parametrization makes ``weights`` from.
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
        """Return the live tensors, not copies; with a parametrization, its A and B.

        Args:
            strength: Factor of the scale, by alpha.
        """
        down, up = self.down, self.up
        if self.parametrization is not None:
            # The first call may be one without gradients, and a norm scope keeps its result.
            with torch.enable_grad():
                down, up = self.parametrization(down, up)
        alpha = strength * self.alpha
        return LayerWeights(down, up, self.magnitude, alpha, self.norm_axis, self.kind, self.groups)

    def versions(self) -> tuple[int, ...]:
        """Return the identity and in-place version of each parameter of a DoRA."""
        own = [*self._parameters.values()]
        if self.parametrization is not None:
            own += self.parametrization._parameters.values()
        try:
            return *map(id, own), *map(_VERSION, own)
        except RuntimeError:  # Tensors that were made in inference mode count nothing.
            return tuple(map(id, own))

    @property
    def is_plain(self) -> bool:
        """True if a layer's site has the parameters themselves, and nothing computed from them."""
        own = self.strengths
        return (
            self.parametrization is None and own.direction_strength == own.magnitude_strength == 1
        )

    def scaled_weights(self) -> LayerWeights:
        """`weights`, with the direction's strength in their scale."""
        return self.weights(self.strengths.direction_strength)

    @torch.no_grad()
    def used_weights(self) -> LayerWeights:
        """Return the weights for a file: `weights` without rows that are switched off."""
        weights = self.weights()
        used = None if self.parametrization is None else self.parametrization.used()
        if used is None or bool(used.all()):
            return weights
        down, up = weights.down[used], weights.up[:, used]
        alpha = weights.alpha * down.shape[0] / weights.rank  # The scale stays.
        return dataclasses.replace(weights, down=down, up=up, alpha=alpha)

    def extra_repr(self) -> str:
        """Return the text that ``print(model)`` shows."""
        kind = "LoRA" if self.magnitude is None else f"DoRA, norm_axis={self.norm_axis}"
        return f"{kind}, rank={self.down.shape[0]}, alpha={self.alpha:g}"


Active = Sequence[tuple[str, LayerAdapter]]
"""Adapters that change the output, with their names."""


class AdaptedLayer(nn.Module):
    """Mixin of layers with adapters. Made by `kinds.adapt_layer` only.

    Attributes:
        kind: How the weight is stored.
        shard: Which rows of the weight this process has between calls, where it is sharded.
        route: The route of an input in the open scope; None outside of scopes.
    """

    kind: LayerKind = "plain"
    shard: RowShard | None = None
    weight: nn.Parameter
    bias: nn.Parameter | None
    adapters: nn.ModuleDict
    keep_output: bool
    # How often a layer has got its first adapter or lost its last one, of whatever model.
    changes: ClassVar[int] = 0
    # Plain attributes, no part of the state dict: the scope's route, a cache, and the weight that a
    # merge replaced.
    route: Route | None
    _statistics: tuple[tuple[Any, ...], WeightStatistics] | None
    _unmerged: Tensor | None

    @property
    def is_merged(self) -> bool:
        """True if the adapters are merged into the weight."""
        return self._unmerged is not None

    def dense(self, dtype: torch.dtype | None = None, *, own: bool = False) -> Tensor:
        """Read the base weight ``(out, in, *k)``, which nothing else here does.

        Args:
            dtype: To cast it to.
            own: Read only the rows of this process, if the weight is sharded.
        """
        weight: Tensor = self.weight
        if own and self.shard is not None:
            # Whole inside of its module's forward, and a DTensor outside.
            to_local = getattr(weight, "to_local", None)
            weight = to_local() if to_local else self.shard.own(weight)
        weight = out_in(weight, self.kind)
        return weight if dtype is None else weight.to(dtype)

    def operation(self, *, leaves_garbage: bool = True) -> Operation:
        """Return the operation of the weight on an input; see `ConvOperation`."""
        return _LINEAR

    @property
    def is_prepared(self) -> bool:
        """True if the operation takes an input as it is, without `prepare`."""
        return self.kind != "embedding"

    def prepare(self, x: Tensor) -> Tensor | OneHot:
        """Return the operation's input: padded, where it does not pad itself, or one-hot."""
        return x

    def active(self) -> Active:
        """The adapters that change the output."""
        adapters = cast("dict[str, LayerAdapter]", self.adapters._modules)
        return [
            (name, adapter)
            for name, adapter in adapters.items()
            if adapter.enabled and adapter.strengths.strength != 0
        ]

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer; the base layer where no adapter is on, or where they are merged.

        Outside of a norm scope, each call computes the norm from the whole weight and waits for the
        device to see whether a channel is ill-conditioned.

        Raises:
            RuntimeError: If the base weight or bias requires a gradient.
        """
        route = self.route
        if route is None or torch.compiler.is_compiling():
            return self.adapted(x, self.active())
        ready = route.ready.get(x.dtype)
        if ready is None or torch.is_autocast_enabled(x.device.type):
            return route.forward(x)
        return ready(x)

    def adapted(self, x: Tensor, active: Active) -> Tensor:
        """`forward` with these of the adapters."""
        if self._unmerged is not None or not active:
            base: Tensor = super().forward(x)
            return base
        op = self.operation()
        inputs, matrix, added = self.operands(x)
        name, adapter = active[0]
        is_dropping = self.training and adapter.dropout > 0
        if len(active) == 1 and adapter.strengths.strength == 1 and not is_dropping:
            factors = self.factors(name, adapter, inputs.dtype)
            return dora_forward(op, inputs, matrix, added, factors)
        terms = [
            (
                self.factors(name, adapter, inputs.dtype),
                adapter.strengths.strength,
                dropout(inputs, adapter.dropout, self.training),
            )
            for name, adapter in active
        ]
        return sum_of_adapters(op, inputs, matrix, added, terms)

    def operands(self, x: Tensor) -> tuple[Tensor | OneHot, Tensor, Tensor | None]:
        """Return the input, the weight ``(out, in, *k)`` and the bias, all of one dtype."""
        bias = self.bias
        if self.weight.requires_grad or (bias is not None and bias.requires_grad):
            raise RuntimeError(
                "the base weight or bias of an adapted layer requires a gradient; freeze it "
                "(requires_grad_(False)): the adapter is what trains"
            )
        # As autocast would for this operation; ids are none of its.
        inputs = self.prepare(x.to(product_dtype(x)) if x.is_floating_point() else x)
        added = None if bias is None else bias.to(inputs.dtype)
        return inputs, self.dense(inputs.dtype), added

    def factors(self, name: str, adapter: LayerAdapter, dtype: torch.dtype) -> Factors:
        """Return an adapter's factors in a dtype, from a plan or, without one, computed alone."""
        if not torch.compiler.is_compiling():
            scales = (self.route or self).scales(name, adapter)
            if scales is not None:
                return self.with_direction(scales.factors(dtype), adapter)
        # No plan can be made while torch compiles: the scope has the factors, or the graph.
        elif self.route is not None and name in self.route.norms:
            factors_by_dtype = self.route.norms[name].factors_by_dtype
            if dtype in factors_by_dtype:
                return factors_by_dtype[dtype]
        strength = adapter.strengths.magnitude_strength
        return factors_of(self.dense(), self.bias, adapter.scaled_weights(), dtype, strength)

    def with_direction(self, factors: Factors, adapter: LayerAdapter) -> Factors:
        """Factors with what no plan of a sharded weight has made: the weight is whole now."""
        if self.shard is None or not factors.gain_in_graph or factors.axis == "input":
            return factors
        made = direction_of(self.dense(), adapter.scaled_weights(), factors.down.dtype)
        return factors._replace(direction=made)

    def scales(self, name: str, adapter: LayerAdapter) -> Scales | None:
        """Return norm and gain of one adapter, from the open scope or computed now.

        None for a LoRA that changed in its scope, or is in none.
        """
        if self.route is not None:
            return self.route.scales(name, adapter)
        return None if adapter.magnitude is None else make_scales([self.site([adapter])])[0]

    @torch.no_grad()
    def site(self, adapters: Sequence[LayerAdapter]) -> Site:
        """Return the layer's `Site` for a plan, with adapters that need not be attached."""
        matrix, made = self.dense(own=True), []
        for adapter in adapters:
            weights = adapter.scaled_weights()
            if weights.magnitude is not None:
                strength = adapter.strengths.magnitude_strength
                magnitude = interpolated_magnitude(matrix, weights, strength)
                weights = dataclasses.replace(weights, magnitude=magnitude)
            made.append(weights)
        statistics = self.statistics(adapters[0])
        return Site(matrix, self.bias, made, statistics, self.keep_output, self.shard)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which is in no scope."""
        return {**self.__dict__, "route": None}

    def statistics(self, adapter: LayerAdapter) -> WeightStatistics | None:
        """Statistics of the base weight for an adapter, as long as it is what it was."""
        if adapter.magnitude is None:
            return None
        axis, weight = adapter.norm_axis, self.dense(own=True)
        key = axis, *identities([weight])[0]
        if self._statistics is None or self._statistics[0] != key:
            self._statistics = key, WeightStatistics(weight.detach(), axis, self.shard)
        return self._statistics[1]

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight with every active adapter in it, float32, as the layer stores it."""
        weight = self.dense()
        layers = [
            (dataclasses.replace(adapter.weights(), kind="plain"), adapter.strengths)
            for _, adapter in self.active()
        ]
        return out_in(merge_tensor(weight, layers, upcast_dtype(weight)), self.kind)

    @torch.no_grad()
    def merge(self, merged: Tensor) -> None:
        """Write what `merged` returned into the weight; the base weight is kept for `unmerge`."""
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


def identities(weights: Iterable[Tensor]) -> list[tuple[Any, ...]]:
    """Return a key of each weight that changes when the weight is written."""
    return [
        (w.data_ptr(), None if w.is_inference() else w._version, w.dtype, w.device) for w in weights
    ]


def state_of(layers: Sequence[AdaptedLayer], adapters: Sequence[Sequence[LayerAdapter]]) -> object:
    """Return all that layouts depend on but the values of parameters."""
    weights = [
        weight if layer.shard is None else layer.dense(own=True)
        for layer in layers
        if (weight := layer._parameters["weight"]) is not None
    ]
    return (
        identities(weights),
        [(layer.keep_output, id(layer._parameters.get("bias"))) for layer in layers],
        [(*map(id, a._parameters.values()), a.alpha, a.strengths) for own in adapters for a in own],
    )


class LayoutCache:
    """Layouts of layers with K adapters each, kept until more than values of parameters changes.

    Attributes:
        flags: Flags of each layout, read back a step late.
    """

    def __init__(self) -> None:
        self.flags: defaultdict[Any, DeferredFlags] = defaultdict(DeferredFlags)
        self._layouts: dict[Any, Layout] = {}
        self._state: object = None

    def of(
        self, layers: Sequence[AdaptedLayer], adapters: Sequence[Sequence[LayerAdapter]]
    ) -> tuple[dict[Any, Layout], bool]:
        """The layouts, by what tells them apart, and whether they are new."""
        state = state_of(layers, adapters)
        if state == self._state:
            return self._layouts, False
        pairs = zip(layers, adapters, strict=True)
        layouts = layouts_of([layer.site(own) for layer, own in pairs])
        # Tensors from a parametrization or a strength are valid in this step only.
        is_kept = all(a.is_plain for own in adapters for a in own)
        self._state, self._layouts = (state, layouts) if is_kept else (None, {})
        return layouts, True


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model itself with their paths, in the order of ``named_modules``.

    The adapters that are attached to it are skipped.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(mismatch("model", model, nn.Module), "model")
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
    """Every adapted layer of a model with its path, in the order of ``named_modules``."""
    for path, module in own_modules(model):
        if isinstance(module, AdaptedLayer):
            yield path, module
