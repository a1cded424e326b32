"""Classes of layers that can carry adapters, and conversion of a module to its class and back.

The classes differ in the operation of the weight on an input (`numerics.operation`) and in how the
weight is stored (`LayerKind`). Everything else is in `layers.AdaptedLayer`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.adapters.layers import AdaptedLayer
from dora_diffusion.numerics.operation import (
    ConvOperation,
    EmbeddingOperation,
    OneHot,
    Operation,
)
from dora_diffusion.numerics.weights import LayerKind, out_in

_EMBEDDING = EmbeddingOperation()


class DoRALinear(AdaptedLayer, nn.Linear):
    """``nn.Linear`` with adapters."""


class _AdaptedConv(AdaptedLayer):
    """Convolutions with adapters, in one or two dimensions, with any number of groups."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    @property
    def is_prepared(self) -> bool:
        """True if the convolution pads itself."""
        return self.padding_mode == "zeros" and not isinstance(self.padding, str)

    def operation(self) -> Operation:
        """Return the convolution with this layer's stride, padding, dilation and groups."""
        padding = self.padding if self.is_prepared else (0,) * len(self.kernel_size)
        zeros = cast("tuple[int, ...]", padding)
        return ConvOperation(self.stride, zeros, self.dilation, self.groups)

    def prepare(self, x: Tensor) -> Tensor:
        """Pad the input for a ``padding_mode`` other than zeros, and for ``padding="same"``."""
        if self.is_prepared:
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode=mode)


class DoRAConv1d(_AdaptedConv, nn.Conv1d):
    """``nn.Conv1d`` with adapters."""


class DoRAConv2d(_AdaptedConv, nn.Conv2d):
    """``nn.Conv2d`` with adapters."""


class DoRAEmbedding(AdaptedLayer, nn.Embedding):
    """``nn.Embedding`` with adapters: its table ``(num, dim)`` is the transposed weight.

    Only the rows that are looked up are computed. On the input axis each row has a magnitude; on
    the output axis, as in PEFT, each dimension has one for all rows. Dropout drops whole tokens of
    the low-rank path, since its inputs are one-hot (PEFT applies none to embeddings).
    """

    kind: LayerKind = "embedding"
    bias = None

    def forward(self, x: Tensor) -> Tensor:
        """See `AdaptedLayer.forward`. As in ``nn.Embedding``, padding has no gradient."""
        y = super().forward(x)
        if self.padding_idx is None or not y.requires_grad:
            return y
        return torch.where((x == self.padding_idx)[..., None], y.detach(), y)

    def operation(self) -> Operation:
        """Return the look-up operation."""
        return _EMBEDDING

    def prepare(self, x: Tensor) -> OneHot:
        """Return ids ``(...)`` as one-hot vectors."""
        return OneHot.of(x, self.weight.dtype)


class _AdaptedConv1D(AdaptedLayer):
    """Transformers' ``Conv1D``, a Linear with a weight ``(in, out)``, with adapters."""

    kind: LayerKind = "conv1d"


_ADAPTED: dict[type[nn.Module], type[AdaptedLayer]] = {
    nn.Linear: DoRALinear,
    nn.Conv1d: DoRAConv1d,
    nn.Conv2d: DoRAConv2d,
    nn.Embedding: DoRAEmbedding,
}
_KINDS = "nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding and transformers' Conv1D"


def _adapted_class(kind: type[nn.Module]) -> type[AdaptedLayer] | None:
    """Return the adapted class of this exact module class; None if it cannot carry adapters."""
    # By name, so that Transformers is not imported for models that do not use it.
    name = kind.__module__, kind.__qualname__
    if kind not in _ADAPTED and name == ("transformers.pytorch_utils", "Conv1D"):
        _ADAPTED[kind] = type("DoRAConv1D", (_AdaptedConv1D, kind), {"__doc__": "With adapters."})
    return _ADAPTED.get(kind)


def can_adapt(module: nn.Module) -> bool:
    """Return whether the module's class is exactly one of the classes that can carry adapters.

    A subclass may read its weight without calling ``forward`` (as the output projection of
    ``nn.MultiheadAttention`` does), and would silently ignore an adapter.
    """
    return not obstacle(module)


def obstacle(module: nn.Module) -> str:
    """Return the module's class and why it cannot carry adapters; empty if it can."""
    if isinstance(module, AdaptedLayer):
        return ""
    name = type(module).__name__
    if _adapted_class(type(module)) is None:
        return f"{name}, but adapters are for {_KINDS}"
    if is_wrapped(module):
        return f"{name} whose forward another tool has wrapped"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return f"{name} with max_norm, which changes its weight whenever it is used"
        if module.scale_grad_by_freq:
            return f"{name} with scale_grad_by_freq"
    return ""


def is_wrapped(module: nn.Module) -> bool:
    """Return whether a layer's ``forward`` was replaced, as by Accelerate's offloading.

    The replacement calls the forward of the module's class at that time and so skips any adapter.
    """
    return _adapted_class(type(module)) is not None and "forward" in vars(module)


def layer_kind(module: nn.Module) -> LayerKind:
    """Return how a module that can carry adapters stores its weight."""
    kind = type(module) if isinstance(module, AdaptedLayer) else _adapted_class(type(module))
    return "plain" if kind is None else kind.kind


def layer_groups(module: nn.Module) -> int:
    """Return the groups of a convolution; 1 for other layers."""
    return cast(int, getattr(module, "groups", 1))


def layer_matrix(module: nn.Module) -> Tensor:
    """Return the weight of a module that can carry adapters, as ``(out, in, *k)``."""
    return out_in(cast(Tensor, module.weight), layer_kind(module))


def adapt_layer(module: nn.Module, keep_output: bool = True) -> AdaptedLayer:
    """Convert the module, in place, to a layer with adapters.

    Raises:
        TypeError: If the module cannot carry adapters, with the reason.
    """
    if isinstance(module, AdaptedLayer):
        return module
    if reason := obstacle(module):
        raise TypeError(f"cannot adapt a {reason}")
    module.__class__ = cast(Any, _adapted_class(type(module)))
    layer = cast(AdaptedLayer, module)
    layer.adapters = nn.ModuleDict()
    layer.route = layer._statistics = layer._unmerged = None
    layer.keep_output = keep_output
    AdaptedLayer.changes += 1
    return layer


def restore_base_class(layer: AdaptedLayer) -> None:
    """Convert an adapted layer back to its base class, in place, with its current weight."""
    del layer.adapters, layer.route, layer._statistics, layer._unmerged, layer.keep_output
    AdaptedLayer.changes += 1
    plain = next(old for old, new in _ADAPTED.items() if new is type(layer))
    layer.__class__ = cast(Any, plain)
