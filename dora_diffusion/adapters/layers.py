"""Layers that carry adapters: what all kinds of them have in common.

An adapted layer *is* the layer that it was, of another class: its parameters, buffers, hooks and
places in the model, so that the base model's state dict, dtype and device handling stay as they
were. Adapters live in the child module ``adapters``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.layer_adapter import LayerAdapter
from dora_diffusion.adapters.sources import noted_source
from dora_diffusion.numerics import fast
from dora_diffusion.numerics.dora import dora_difference, dora_forward, moved_magnitude
from dora_diffusion.numerics.fast import Gain, PlanInputs, WeightStatistics
from dora_diffusion.numerics.merging import merge_layers
from dora_diffusion.numerics.operation import OneHot, Operation, dropout
from dora_diffusion.numerics.precision import product_dtype, wide, wide_dtype
from dora_diffusion.numerics.weights import LayerKind, NormAxis, Strengths, oriented


class AdaptedLayer(nn.Module):
    """What layers with adapters have in common. Made by `kinds.adapt_layer` only.

    Attributes:
        kind: How the weight is stored.
    """

    kind: LayerKind = "plain"
    weight: nn.Parameter
    bias: nn.Parameter | None
    adapters: nn.ModuleDict
    keep_output: bool
    # How often a layer has got its first adapter or lost its last one, of whatever model.
    changes: ClassVar[int] = 0
    # Plain attributes, no part of the state dict: caches, and the weight that a merge replaced.
    _gain_cache: dict[str, Gain] | None
    # Of what parameters each gain there is. Apart from it, since compiled layers read that.
    _gain_versions: dict[str, list[tuple[int, int]]]
    _statistics: tuple[tuple[Any, ...], WeightStatistics] | None
    _unmerged: Tensor | None

    @property
    def is_merged(self) -> bool:
        """Whether the adapters are in the weight."""
        return self._unmerged is not None

    @property
    def matrix(self) -> Tensor:
        """The weight as ``(out, in, *k)``."""
        return oriented(self.weight, self.kind)

    def operation(self) -> Operation:
        """What the weight does to an input."""
        raise NotImplementedError

    def prepare(self, x: Tensor) -> Tensor | OneHot:
        """What the operation takes: padded, where it does not pad itself, or one-hot."""
        return x

    def active(self) -> list[tuple[str, LayerAdapter]]:
        """The adapters that change the output, with their names."""
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
        active = self.active() if self._unmerged is None else []
        if not active:
            base: Tensor = super().forward(x)
            return base
        weight, bias = self.weight, self.bias
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            raise RuntimeError(
                "the base weight or bias of an adapted layer requires a gradient; freeze it "
                "(requires_grad_(False)): the adapter is what trains"
            )
        is_traced = torch.compiler.is_compiling()
        source = None if is_traced else noted_source(x)
        # As autocast would for this operation; ids are none of its.
        unpadded = x.to(product_dtype(x)) if x.is_floating_point() else x
        op, prepared = self.operation(), self.prepare(unpadded)
        name, adapter = active[0]
        dropping = self.training and any(other.dropout > 0 for _, other in active)
        is_plain = adapter.strengths == _PLAIN_STRENGTHS and adapter.magnitude is not None
        is_alone = len(active) == 1 and is_plain and not dropping
        if is_alone and not fast.ENABLED:
            return dora_forward(op, prepared, self.matrix, bias, adapter.weights())
        if not is_alone or isinstance(prepared, OneHot) or not fast.serves(op):
            return self._sum_of_differences(active, op, prepared)
        if is_traced:
            return self._traced(op, prepared, name, adapter)
        source = source if prepared is unpadded else None
        matrix = oriented(weight, self.kind)
        return fast.dora(op, prepared, matrix, bias, self.gain(name, adapter), source)

    def _traced(self, op: Operation, x: Tensor, name: str, adapter: LayerAdapter) -> Tensor:
        """The layer as `torch.compile` sees it, which can make no plan.

        Without the factors of one, it computes the page: where no norm scope is open, and for
        channels of a small gain.
        """
        gain = self._kept_gain(name)
        factors = None if gain is None or gain.small is not None else gain.made.get(x.dtype)
        if gain is None or factors is None:
            norm = None if gain is None else gain.norm
            return dora_forward(op, x, self.matrix, self.bias, adapter.weights(), norm)
        return fast.traced_dora(op, x, self.matrix, self.bias, factors, gain.axis)

    def _sum_of_differences(
        self, active: list[tuple[str, LayerAdapter]], op: Operation, x: Tensor | OneHot
    ) -> Tensor:
        """``base(x) + sum_k strength_k * (adapted_k(x) - base(x))``, of the unmerged base."""
        dtype = x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        base = op(x, self.matrix.to(dtype), bias)
        unbiased = base if bias is None else base - op.broadcast(bias)
        result = base
        for name, adapter in active:
            # Dropout is on the low-rank path as in PEFT, where W x is part of that path.
            dropped = dropout(x, adapter.dropout, self.training)
            difference = dora_difference(
                op,
                dropped,
                self.matrix,
                adapter.scaled_weights(),
                adapter.strengths.magnitude_strength,
                norm=self._norm(name, adapter),
                unbiased=unbiased if dropped is x or adapter.dropout == 0 else None,
            )
            result = result + (adapter.strengths.strength * difference).to(dtype)
        return result

    def _norm(self, name: str, adapter: LayerAdapter) -> Tensor | None:
        """The norm that the fast path keeps for a step; None: the page is to compute it."""
        if not fast.ENABLED or adapter.magnitude is None:
            return None
        gain = self._kept_gain(name)
        if gain is None and not torch.compiler.is_compiling():
            gain = self.gain(name, adapter)
        return None if gain is None else gain.norm

    def _kept_gain(self, name: str) -> Gain | None:
        """One adapter's gain from the scope's cache, if one is open and has it."""
        gain = None if self._gain_cache is None else self._gain_cache.get(name)
        if gain is not None and not torch.compiler.is_compiling():
            self.require_unchanged(name)
        return gain

    def gain(self, name: str, adapter: LayerAdapter) -> Gain:
        """Norm and gain of one adapter: from the scope's cache where one is open, else computed."""
        gain = self._kept_gain(name)
        if gain is None:
            gain = fast.make_gains([self._plan_inputs(adapter)])[0]
            if self._gain_cache is not None:
                self.keep_gain(name, gain)
        return gain

    def keep_gain(self, name: str, gain: Gain) -> None:
        """Put an adapter's gain into the cache of the scope that is open."""
        assert self._gain_cache is not None
        self._gain_cache[name] = gain
        self._gain_versions[name] = self._adapter(name).versions()

    def require_unchanged(self, name: str) -> None:
        """Check that an adapter is the one whose gain is in the cache.

        Raises:
            RuntimeError: If a parameter was written or replaced since.
        """
        if self._adapter(name).versions() != self._gain_versions[name]:
            raise RuntimeError(
                "an adapter's parameters changed inside norm_scope, which keeps the norms of what "
                "they were: open one norm_scope for each optimizer step, around its forward and "
                "backward passes; whatever changes parameters, such as optimizer.step(), call it "
                "after it"
            )

    def _adapter(self, name: str) -> LayerAdapter:
        return cast("LayerAdapter", self.adapters._modules[name])

    @torch.no_grad()
    def _plan_inputs(self, adapter: LayerAdapter) -> PlanInputs:
        plain = adapter.strengths.direction_strength == 1
        layer = adapter.weights() if plain else adapter.scaled_weights()
        matrix = self.matrix
        magnitude = moved_magnitude(matrix, layer, adapter.strengths.magnitude_strength)
        statistics = self._weight_statistics(adapter.norm_axis)
        return PlanInputs(layer, magnitude, matrix, self.bias, statistics, self.keep_output)

    def forget(self, name: str) -> None:
        """Drop the gain of an adapter that is not what it was."""
        if self._gain_cache is not None:
            self._gain_cache.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: not the gains, which nobody would close for it."""
        return {**self.__dict__, "_gain_cache": None}

    def _weight_statistics(self, axis: NormAxis) -> WeightStatistics:
        """Statistics of the base weight, for as long as it is what it was."""
        weight = self.weight
        version = None if weight.is_inference() else weight._version
        identity = (axis, weight.data_ptr(), version, weight.dtype, weight.device)
        if self._statistics is None or self._statistics[0] != identity:
            self._statistics = (identity, WeightStatistics(self.matrix.detach(), axis))
        return self._statistics[1]

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight with every active adapter in it, float32, as the layer stores it."""
        layers = [(adapter.weights(), adapter.strengths) for _, adapter in self.active()]
        if not layers:
            return wide(self.weight)
        return merge_layers(self.weight, layers, wide_dtype(self.weight))

    @torch.no_grad()
    def merge(self, merged: Tensor | None = None) -> None:
        """Write the adapters into the weight; the base weight is kept for `unmerge`.

        ``merged`` is what `merged` returns, where that was computed already.
        """
        if self._unmerged is None:
            merged = self.merged() if merged is None else merged
            self._unmerged = self.weight.detach().clone()
            self.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if self._unmerged is not None:
            self.weight.copy_(self._unmerged)
            self._unmerged = None


_PLAIN_STRENGTHS = Strengths()


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Every adapted layer of a model with its path, in the order of ``named_modules``.

    Which takes several times as long, and each step of training asks.
    """
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[int] = set()
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, AdaptedLayer):
            yield path, module
            continue
        for name, child in reversed(module._modules.items()):
            if child is not None:
                waiting.append((f"{path}.{name}" if path else name, child))
