"""Which layers' inputs follow from something kept anyway, noted on a tensor as it passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.numerics.source import Recipe, Source

_NOTED = "_dora_source"


def _silu(module: nn.SiLU) -> Callable[[Tensor], Tensor] | None:
    return None if module.inplace else F.silu


def _layer_norm(module: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    shape, eps = module.normalized_shape, module.eps
    return lambda x: F.layer_norm(x, shape, module.weight, module.bias, eps)


def _group_norm(module: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
    groups, eps = module.num_groups, module.eps
    return lambda x: F.group_norm(x, groups, module.weight, module.bias, eps)


_MAKERS: dict[type[nn.Module], Callable[[Any], Callable[[Tensor], Tensor] | None]] = {
    nn.SiLU: _silu,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}


def watch_sources(model: nn.Module) -> None:
    """Have every norm and activation of a model note on its output what it was made from.

    Exactly the known classes: a subclass may compute something else.
    """
    for module in model.modules():
        if type(module) in _MAKERS and _note not in module._forward_hooks.values():
            module.register_forward_hook(_note)


def unwatch_sources(model: nn.Module) -> None:
    """Undo `watch_sources`."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if hook is _note]:
            del module._forward_hooks[key]


def noted_source(x: Tensor) -> Source | None:
    """What `watch_sources` had noted on a tensor, if anything."""
    source: Source | None = getattr(x, _NOTED, None)
    return source


def _note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    # What needs no gradient was not kept.
    if torch.compiler.is_compiling() or len(args) != 1 or not args[0].requires_grad:
        return
    # A parameter that trains may have another value in the backward pass.
    trains = any(p.requires_grad for p in module.parameters(recurse=False))
    make = None if trains else _MAKERS[type(module)](module)
    if make is None or not torch.is_grad_enabled():
        return
    dtype = output.dtype
    # Autocast runs norms in float32, whatever they are given.
    recipe = Recipe(lambda kept: make(kept.to(dtype)))
    setattr(output, _NOTED, Source(args[0].detach(), recipe))
